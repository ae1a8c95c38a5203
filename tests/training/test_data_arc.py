"""ARC: what tokens a grid becomes and back, variants that can be undone, votes."""

import json

import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.models.hrm import Rows
from jaxrec.training.data import arc
from jaxrec.training.data.arc import Augmentation, Pair, Task, Votes
from jaxrec.training.data.puzzle_batches import OrderedBatches
from jaxrec.training.data.puzzle_folders import BLANK, read_split, write_split


def grid(*rows):
    return np.array([[int(c) for c in row] for row in rows], np.uint8)


MIRROR = Task(
    "mirror",
    (Pair(grid("120", "003"), grid("021", "300")), Pair(grid("45"), grid("54"))),
    (Pair(grid("6789"), grid("9876")),),
)
TRANSPOSE = Task(
    "transpose",
    (Pair(grid("12", "34", "56"), grid("135", "246")),),
    (Pair(grid("78"), grid("7", "8")), Pair(grid("123"), grid("1", "2", "3"))),
)


def save(task, folder):
    def values(pairs):
        return [
            {"input": pair.question.tolist()}
            | ({} if pair.answer is None else {"output": pair.answer.tolist()})
            for pair in pairs
        ]

    text = json.dumps({"train": values(task.train), "test": values(task.test)})
    (folder / f"{task.name}.json").write_text(text)


def assert_same_tasks(one, other):
    assert one.name == other.name
    for pairs, others in zip(one[1:], other[1:], strict=True):
        for x, y in zip(pairs, others, strict=True):
            np.testing.assert_array_equal(x.question, y.question)
            np.testing.assert_array_equal(x.answer, y.answer)


def test_tasks_are_read_in_the_order_of_their_names(tmp_path):
    secret = Task("zz", MIRROR.train, (Pair(grid("12"), None),))
    for task in (secret, TRANSPOSE, MIRROR):
        save(task, tmp_path)
    tasks = arc.read_tasks(tmp_path)
    assert [task.name for task in tasks] == ["mirror", "transpose", "zz"]
    assert_same_tasks(tasks[0], MIRROR)
    assert tasks[2].test[0].answer is None


def test_the_tokens_of_a_grid():
    tokens = arc.to_tokens(grid("019", "450"), (2, 3)).reshape(30, 30)
    np.testing.assert_array_equal(
        tokens[1:6, 2:8],
        [
            [0, 0, 0, 0, 0, 0],
            [0, 2, 3, 11, 1, 0],
            [0, 6, 7, 2, 1, 0],
            [0, 1, 1, 1, 0, 0],
            [0, 0, 0, 0, 0, 0],
        ],
    )
    assert np.count_nonzero(tokens) == 11
    full = arc.to_tokens(np.zeros((30, 30), np.uint8))
    assert np.all(full == 2)
    assert np.count_nonzero(arc.to_tokens(np.zeros((30, 2), np.uint8)) == 1) == 30
    for offset in ((29, 0), (0, 28), (-1, 0)):
        with pytest.raises(ValueError, match=r"a grid of \(2, 3\) at .* leaves the 30 x 30"):
            arc.to_tokens(grid("019", "450"), offset)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (30, 30), (30, 1), (3, 30)])
def test_tokens_become_the_grid_again(shape):
    made = np.random.default_rng(0).integers(0, 10, shape).astype(np.uint8)
    np.testing.assert_array_equal(arc.to_grid(arc.to_tokens(made)), made)


def test_a_badly_ended_answer_is_its_largest_rectangle():
    tokens = np.zeros((30, 30), np.int32)
    tokens[0, :5] = 3
    tokens[1:3, :4] = 4
    tokens[3, :1] = 5
    tokens[1, 20:] = 6  # beyond a gap
    tokens[0, 4] = 12  # no token of a grid
    np.testing.assert_array_equal(arc.to_grid(tokens.reshape(-1)), grid("1111", "2222", "2222"))
    assert arc.to_grid(np.ones(900, np.int32)).size == 0


def test_augmentations_can_be_undone_and_named():
    rng = np.random.default_rng(0)
    seen = set()
    made = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for _ in range(60):
        change = arc.augmentation(rng)
        seen.add(change.symmetry)
        assert change.colours[0] == 0 and sorted(change.colours) == list(range(10))
        np.testing.assert_array_equal(change.undo(change(made)), made)
        task, again = arc.parse_name(change.name_of("ab_t1"))
        assert (task, again.symmetry) == ("ab_t1", change.symmetry)
        np.testing.assert_array_equal(again.colours, change.colours)
    assert seen == set(range(8))
    turned = Augmentation(1, np.array([0, 2, 1, 3, 4, 5, 6, 7, 8, 9]))
    np.testing.assert_array_equal(turned(grid("12", "30")), grid("10", "23"))
    assert turned.name_of("a") == "a_t1_0213456789"


@pytest.mark.parametrize("name", ["a", BLANK, "a_t8_0123456789", "a_t1_0113456789", "a_t1_012"])
def test_other_names_change_nothing(name):
    task, change = arc.parse_name(name)
    assert task == name
    np.testing.assert_array_equal(change(grid("12", "30")), grid("12", "30"))


def test_variants_are_different_and_few_where_there_are_few():
    variants = arc.augment(MIRROR, 20, np.random.default_rng(0))
    assert len(variants) == 21 and variants[0] is MIRROR
    assert len({variant.name for variant in variants}) == 21
    for variant in variants:
        _, change = arc.parse_name(variant.name)
        for pair, original in zip(
            variant.train + variant.test, MIRROR.train + MIRROR.test, strict=True
        ):
            np.testing.assert_array_equal(change.undo(pair.question), original.question)
            np.testing.assert_array_equal(change.undo(pair.answer), original.answer)
    black = Task("black", (Pair(grid("00"), grid("0")),), (Pair(grid("000"), None),))
    assert len(arc.augment(black, 20, np.random.default_rng(0))) == 2  # lying and standing


def examples(puzzles):
    """Question, answer, puzzle and group of each example."""
    example = np.arange(len(puzzles.inputs))
    puzzle = np.searchsorted(puzzles.puzzle_indices, example, side="right") - 1
    group = np.searchsorted(puzzles.group_indices, puzzle, side="right") - 1
    return zip(
        puzzles.inputs, puzzles.labels, puzzles.puzzle_identifiers[puzzle], group, strict=True
    )


def placed(tokens):
    """The grid that tokens hold and where."""
    tokens = tokens.reshape(30, 30)
    at = np.argwhere(tokens >= 2).min(axis=0)
    moved = np.zeros_like(tokens)
    moved[: 30 - at[0], : 30 - at[1]] = tokens[at[0] :, at[1] :]
    return arc.to_grid(moved.reshape(-1)), tuple(at.tolist())


def test_who_is_trained_on_what():
    sets = arc.puzzle_sets([MIRROR], [TRANSPOSE], augmentations=5, seed=0)
    assert len(sets.names) == 13 and sets.names[0] == BLANK
    assert sets.names[1] == "mirror" and sets.names[7] == "transpose"
    assert sets.train.group_indices.tolist() == [0, 6, 12]
    assert sets.test.group_indices.tolist() == [0, 6]
    assert np.diff(sets.train.puzzle_indices).tolist() == [3] * 6 + [1] * 6
    np.testing.assert_array_equal(sets.train.puzzle_identifiers, np.arange(1, 13))
    np.testing.assert_array_equal(sets.test.puzzle_identifiers, np.arange(7, 13))
    wanted = {
        "mirror": [*MIRROR.train, *MIRROR.test] * 6,
        "transpose": [*TRANSPOSE.train] * 6,
    }
    moved = []
    for question, answer, puzzle, group in examples(sets.train):
        task, change = arc.parse_name(sets.names[puzzle])
        pair = wanted[task].pop(0)
        assert group == ["mirror", "transpose"].index(task)
        (shown, at), (told, also) = placed(question), placed(answer)
        np.testing.assert_array_equal(change.undo(shown), pair.question)
        np.testing.assert_array_equal(change.undo(told), pair.answer)
        assert at == also
        moved.append(at != (0, 0))
    assert wanted == {"mirror": [], "transpose": []}
    assert np.sum(np.reshape(moved[:18], (6, 3)), axis=1).tolist() == [2] * 6
    assert not any(moved[18:])  # the only pair of each variant
    pairs = [*TRANSPOSE.test] * 6
    for (question, answer, puzzle, _), pair in zip(examples(sets.test), pairs, strict=True):
        _, change = arc.parse_name(sets.names[puzzle])
        np.testing.assert_array_equal(change.undo(arc.to_grid(question)), pair.question)
        np.testing.assert_array_equal(change.undo(arc.to_grid(answer)), pair.answer)


def test_sets_are_a_function_of_the_seed_and_can_be_kept(tmp_path):
    one, same, other = (
        arc.puzzle_sets([MIRROR], [TRANSPOSE], augmentations=3, seed=seed) for seed in (1, 1, 2)
    )
    assert one.names == same.names != other.names
    np.testing.assert_array_equal(one.train.inputs, same.train.inputs)
    for part in ("train", "test"):
        write_split(
            tmp_path / part,
            {"all": getattr(one, part)},
            vocabulary=arc.VOCABULARY,
            identifiers=len(one.names),
        )
    assert read_split(tmp_path / "test").description.seq_len == 900
    assert arc.puzzle_sets([MIRROR], [], augmentations=0).test is None


def test_a_perfect_model_scores_all_and_a_secret_answer_is_not_asked_for():
    sets = arc.puzzle_sets([], [MIRROR, TRANSPOSE], augmentations=4)
    batches = OrderedBatches(sets.test, batch=4, ignored_label=None)
    votes = Votes(sets.names)
    for step in range(batches.num_batches):
        rows = batches(step)
        votes.add(rows, rows.labels, np.ones(4))
    assert votes.score([MIRROR, TRANSPOSE]) == 1.0
    other = TRANSPOSE._replace(test=(TRANSPOSE.test[0], Pair(grid("999"), grid("9"))))
    assert votes.score([other]) == 0.5
    assert votes.score([MIRROR, other]) == 0.75
    secret = MIRROR._replace(test=(Pair(grid("1"), None),))
    labels = arc.puzzle_sets([], [secret], augmentations=0).test.labels
    assert np.all(labels == arc.PAD)
    with pytest.raises(ValueError, match="the task mirror has no answers to compare with"):
        votes.score([secret])
    with pytest.raises(ValueError, match="there is no task to score"):
        votes.score([])


def test_votes_are_counted_and_then_weighed():
    names = [BLANK, "a", "a_t2_0213456789"]
    question = grid("12")

    def cast(votes, answers):
        for puzzle, answer, sure in answers:
            _, change = arc.parse_name(names[puzzle])
            tokens = arc.to_tokens(change(question))[None]
            rows = Rows(tokens, tokens, np.array([puzzle]))
            votes.add(rows, arc.to_tokens(change(answer))[None], np.array([sure]))

    votes = Votes(names)
    x, y, z = grid("1"), grid("2"), grid("33")
    cast(votes, [(1, x, 0.9), (1, y, 0.1), (2, y, 0.2), (1, z, 0.8), (0, z, 0.5), (0, z, 0.5)])
    first, second = votes.attempts("a", question)
    np.testing.assert_array_equal(first, y)  # two votes, of either variant
    np.testing.assert_array_equal(second, x)  # one vote like z, but surer; vector 0 has none
    assert len(votes.attempts("a", question, 5)) == 3
    cast(votes, [(1, z, 0.0)])
    np.testing.assert_array_equal(votes.attempts("a", question, 1)[0], z)  # 0.4 against 0.15
    assert votes.attempts("a", grid("21")) == [] == votes.attempts("b", question)
    with pytest.raises(ValueError, match="there are 3 names of vectors, got vector 3"):
        votes.add(Rows(*[np.zeros((1, 900), int)] * 2, np.array([3])), np.zeros((1, 900)), [1])


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", r"Cannot read .*bad.json"),
        ("[]", "bad.json must hold a list of pairs, 'train'"),
        ({"train": []}, "must hold a list of pairs, 'test'"),
        ({"train": [3]}, "must hold a list of pairs, 'train'"),
        ({"train": [{"input": [[1]]}]}, "train pair 1: 'output' must be 1 .. 30 rows"),
        ({"test": [{"output": [[1]]}]}, "test pair 1: 'input' must be 1 .. 30 rows"),
        ({"test": [{"input": [[1, 2], [3]]}]}, "'input' must be 1 .. 30 rows of equally many"),
        ({"test": [{"input": [[]]}]}, "'input' must be 1 .. 30 rows"),
        ({"test": [{"input": [[1]] * 31}]}, "'input' must be 1 .. 30 rows"),
        ({"test": [{"input": [[1, 10]]}]}, "colours of 'input' are 0 .. 9, got 10"),
        ({"test": [{"input": [[1, "a"]]}]}, "colours of 'input' are 0 .. 9, got 'a'"),
    ],
)
def test_odd_tasks_are_named(tmp_path, text, message):
    if isinstance(text, dict):
        text = json.dumps(({"train": []} if "test" in text else {}) | text)
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=message):
        arc.read_tasks(tmp_path)


def test_what_cannot_be_trained_on_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no \*.json; expected a folder of ARC tasks"):
        arc.read_tasks(tmp_path)
    with pytest.raises(ValueError, match="tasks must have different names"):
        arc.puzzle_sets([MIRROR], [MIRROR])
    with pytest.raises(ValueError, match="there is no pair to train on"):
        arc.puzzle_sets([], [])
    secret = MIRROR._replace(test=(Pair(grid("1"), None),))
    with pytest.raises(ValueError, match="a pair of mirror that is to be trained on has no answer"):
        arc.puzzle_sets([secret], [], augmentations=0)
