"""From names and folders to puzzles: made ones, ARC tasks, published folders; what is refused."""

import json

import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.training.config import PuzzleDataConfig
from jaxrec.training.data import arc, mazes, sudoku
from jaxrec.training.data.puzzle_folders import write_identifiers, write_split
from jaxrec.training.data.puzzle_sources import are_puzzles, load_puzzles, made_like
from jaxrec.training.data.puzzles import joined, single_puzzles, spread


def small(source, **fields):
    return PuzzleDataConfig(
        source=str(source), **({"puzzles": 4, "held_out": 3, "augmentations": 0} | fields)
    )


def tokens_as(look, row):
    return "".join(look.symbols[token] for token in row)


@pytest.mark.parametrize(("size", "clues"), [(4, (9, 10)), (6, (25, 25))])
def test_made_sudokus_have_their_solutions(size, clues):
    data = load_puzzles(small(f"sudoku-{size}x{size}", augmentations=2, clues=clues))
    assert (data.length, data.vocabulary) == (size * size, size + 2)
    assert len(data.train[0].inputs) == 12 and len(data.valid.inputs) == 3
    for question, answer in zip(data.valid.inputs, data.valid.labels, strict=True):
        grid = sudoku.parse(tokens_as(data.look, question))
        solved = sudoku.solve(grid).answer
        assert tokens_as(data.look, answer) == "".join(map(str, solved.reshape(-1)))
        assert clues[0] <= np.count_nonzero(grid) <= clues[1]
    assert data.look.symbols[data.look.open] == "."


def test_made_mazes_have_their_paths():
    data = load_puzzles(small("maze-5x7"))
    assert (data.length, data.vocabulary, data.look.shape) == (35, 6, (5, 7))
    for question, answer in zip(data.valid.inputs, data.valid.labels, strict=True):
        text = tokens_as(data.look, question)
        lines = "\n".join(text[i : i + 7] for i in range(0, 35, 7))
        np.testing.assert_array_equal(mazes.solve(mazes.parse(lines)).answer.reshape(-1), answer)
    assert len(load_puzzles(small("maze-5x5", augmentations=None)).train[0].inputs) == 4 * 8


def test_no_held_out_puzzle_is_in_training_and_a_run_finds_the_same_again():
    config = small("sudoku-4x4", puzzles=30, held_out=30, augmentations=20, clues=(14, 14))
    data, again = load_puzzles(config), load_puzzles(config)
    seen = {row.tobytes() for row in data.train[0].inputs}
    assert seen.isdisjoint(row.tobytes() for row in data.valid.inputs)
    assert len({row.tobytes() for row in data.valid.inputs}) == 30
    assert data.provenance == again.provenance
    assert data.provenance["groups"] == 30 and data.provenance["examples"] == 630
    other = load_puzzles(small("sudoku-4x4", seed=1))
    assert other.provenance["sha256"] != data.provenance["sha256"]


def test_a_published_folder_with_two_sets(tmp_path):
    rows = np.arange(1, 13, dtype=np.uint8).reshape(6, 2)
    one, two = single_puzzles(rows[:2], rows[:2]), single_puzzles(rows[2:], rows[2:])
    write_split(tmp_path / "train", {"one": one, "two": two}, vocabulary=13)
    write_split(tmp_path / "test", {"one": one, "two": two}, vocabulary=13)
    data = load_puzzles(small(tmp_path))
    np.testing.assert_array_equal(data.valid.inputs, rows)
    assert data.valid.group_indices.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert len(data.train) == 2 and data.look.symbols[12] == "c"
    few = data.held_out(2, 3)
    assert [few(step).tokens[:, 0].tolist() for step in range(2)] == [[1, 5], [9, 0]]


def test_arc_tasks_are_asked_and_voted_on(tmp_path):
    pair = {"input": [[1, 2]], "output": [[2, 1]]}
    for part, tasks in {"training": ("a",), "evaluation": ("b", "c")}.items():
        (tmp_path / part).mkdir()
        for name in tasks:
            text = json.dumps({"train": [pair, pair], "test": [pair]})
            (tmp_path / part / f"{name}.json").write_text(text)
    data = load_puzzles(small(tmp_path, augmentations=3))
    assert (data.length, data.vocabulary) == (900, 12)
    assert data.identifiers == len(data.names) == 1 + 3 * 4
    assert [task.name for task in data.tasks] == ["b", "c"]
    assert len(data.valid.inputs) == 2 * 4
    flat = load_puzzles(small(tmp_path / "evaluation", augmentations=1))
    assert [task.name for task in flat.tasks] == ["b", "c"]


def test_a_published_folder_of_arc_is_voted_on_where_its_tasks_are_beside_it(tmp_path):
    """The original's folders have names of vectors, and the tasks lie elsewhere until they are put
    there; those that are not asked do not count.
    """
    pair = {"input": [[1, 2]], "output": [[2, 1]]}
    tasks, folder = tmp_path / "tasks", tmp_path / "published"
    tasks.mkdir()
    for name in ("b", "c"):
        (tasks / f"{name}.json").write_text(json.dumps({"train": [pair, pair], "test": [pair]}))
    sets = arc.puzzle_sets([], arc.read_tasks(tasks), augmentations=2)
    for part, made in (("train", sets.train), ("test", sets.test)):
        write_split(folder / part, {"all": made}, vocabulary=12, identifiers=len(sets.names))
    assert load_puzzles(small(folder)).tasks is None
    write_identifiers(folder, sets.names)
    assert load_puzzles(small(folder)).tasks is None
    tasks.rename(folder / "evaluation")
    (folder / "evaluation" / "d.json").write_text(json.dumps({"train": [pair], "test": [pair]}))
    data = load_puzzles(small(folder))
    assert data.names == sets.names and [task.name for task in data.tasks] == ["b", "c"]
    votes = arc.Votes(data.names)
    rows = data.held_out(len(data.valid.inputs))(0)
    votes.add(rows, rows.labels.clip(0), np.zeros(len(rows.puzzle)))
    assert votes.score(data.tasks) == 1
    write_identifiers(folder, sets.names[:-1])
    with pytest.raises(UserError, match=r"identifiers\.json names 6 vectors, but .* counts 7"):
        load_puzzles(small(folder))


def test_epochs_joined_leave_out_less():
    """Of one epoch of 10 groups batches of 4 take 8; of five joined, 48 of 50."""
    data = load_puzzles(small("sudoku-4x4", puzzles=10, augmentations=0))
    assert data.batches(4, 0)._count(0) == data.batches(4, 0, 1)._count(0) == 2
    joined = data.batches(4, 0, 5)
    assert joined._count(0) == 12
    visits = np.concatenate([joined(step).tokens for step in range(10)]).reshape(4, 10, 16)
    for epoch in visits:
        assert len(np.unique(epoch, axis=0)) == 10


def test_batches_take_as_many_epochs_as_they_need():
    data = load_puzzles(small("sudoku-4x4", puzzles=3))
    assert data.batches(8, 0)(0).tokens.shape == (8, 16)


def test_sets_are_joined_and_thinned():
    rows = np.arange(12).reshape(6, 2)
    sets = [single_puzzles(rows[:4], rows[:4], copies=2), single_puzzles(rows[4:], rows[4:])]
    both = joined(sets)
    assert both.puzzle_indices.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert both.group_indices.tolist() == [0, 2, 4, 5, 6]
    np.testing.assert_array_equal(both.inputs, rows)
    named = both._replace(puzzle_identifiers=np.arange(6))
    few = spread(named, 3)
    assert few.puzzle_identifiers.tolist() == [0, 2, 4]
    np.testing.assert_array_equal(few.inputs, rows[::2])


def test_what_can_only_be_puzzles(tmp_path):
    write_split(
        tmp_path / "train", {"all": single_puzzles(*[np.ones((1, 4), np.uint8)] * 2)}, vocabulary=2
    )
    known = ("sudoku-4x4", "maze-30x30", str(tmp_path))
    assert [are_puzzles(x) for x in (*known, "python-docs", "sudoku", str(tmp_path / "train"))] == [
        *[True] * 3,
        *[False] * 3,
    ]
    assert made_like(81, 11) == "sudoku-9x9" and made_like(900, 6) == "maze-30x30"
    assert made_like(900, 12) is None and made_like(35, 6) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "sudoku-5x5"}, "no puzzles 'sudoku-5x5'. Did you mean sudoku-"),
        ({"source": "maze-1x1"}, "needs at least two cells"),
        ({"source": "maze-4x4", "augmentations": 3}, "must be 0 or 7, got 3"),
        ({"source": "maze-4x5", "augmentations": 7}, "symmetries need square mazes"),
        ({"source": "sudoku-4x4", "clues": (1, 2)}, "needs 4 .. 16 clues"),
        ({"source": "maze-1x2", "augmentations": 0, "held_out": 50}, "not in training"),
    ],
)
def test_puzzles_that_cannot_be_made_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        load_puzzles(small(**fields))


def test_folders_that_hold_no_puzzles_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no puzzles"):
        load_puzzles(small(tmp_path))
    rows = np.ones((2, 4), np.uint8)
    write_split(tmp_path / "train", {"all": single_puzzles(rows, rows)}, vocabulary=3)
    with pytest.raises(UserError, match="test is no folder"):
        load_puzzles(small(tmp_path))
    write_split(tmp_path / "test", {"all": single_puzzles(rows, rows)}, vocabulary=4)
    with pytest.raises(UserError, match="must agree, but vocab_size is 3 and 4"):
        load_puzzles(small(tmp_path))
    (tmp_path / "tasks").mkdir()
    text = json.dumps({"train": [{"input": [[1]], "output": [[1]]}], "test": []})
    (tmp_path / "tasks" / "a.json").write_text(text)
    with pytest.raises(UserError, match="no task with a test"):
        load_puzzles(small(tmp_path / "tasks"))
