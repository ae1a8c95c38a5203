"""Sudoku: the solver against all grids, puzzles with one solution, symmetries that keep it one."""

import itertools

import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.training.data import sudoku

KNOWN = "53..7.... 6..195... .98....6. 8...6...3 4..8.3..1 7...2...6 .6....28. ...419..5 ....8..79"
KNOWN_ANSWER = (
    "534678912 672195348 198342567 859761423 426853791 713924856 961537284 287419635 345286179"
)
HARD = "4.....8.5.3..........7......2.....6.....8.4......1.......6.3.7.5..2.....1.4......"
EMPTY = np.zeros((4, 4), np.int64)


def keeps_the_rules(grid):
    """Every row, column and box has every digit, written out without the library's helpers."""
    size = len(grid)
    height, width = {4: (2, 2), 6: (2, 3), 9: (3, 3)}[size]
    boxes = [
        grid[i : i + height, j : j + width].ravel()
        for i in range(0, size, height)
        for j in range(0, size, width)
    ]
    return all(sorted(unit) == list(range(1, size + 1)) for unit in [*grid, *grid.T, *boxes])


def all_answers(question):
    """By trying everything: the definition of a 4 x 4 puzzle's solutions."""
    rows = list(itertools.permutations(range(1, 5)))
    fits = [
        [row for row in rows if all(q in (0, d) for q, d in zip(line, row, strict=True))]
        for line in question.tolist()
    ]
    return [grid for grid in map(np.array, itertools.product(*fits)) if keeps_the_rules(grid)]


def test_a_puzzle_from_a_newspaper():
    solved = sudoku.solve(sudoku.parse(KNOWN))
    np.testing.assert_array_equal(solved.answer, sudoku.parse(KNOWN_ANSWER))
    np.testing.assert_array_equal(solved.question, sudoku.parse(KNOWN))
    assert solved.backtracks == 0


def test_there_are_288_grids_of_4_by_4():
    found = sudoku.search(EMPTY, most=1000).solutions
    assert len({grid.tobytes() for grid in found}) == len(found) == 288
    assert all(map(keeps_the_rules, found))


def test_the_solver_finds_what_trying_everything_finds():
    rng = np.random.default_rng(0)
    counts = set()
    for _ in range(12):
        question = np.where(rng.random((4, 4)) < 0.45, sudoku.make(4, seed=5).answer, 0)
        question[0, 0] = rng.integers(5)  # right, wrong or blank
        try:
            found = sudoku.search(question, most=1000).solutions
        except UserError:
            found = []
        wanted = all_answers(question)
        assert {grid.tobytes() for grid in found} == {grid.tobytes() for grid in wanted}
        assert len(found) == len(wanted)
        counts.add(min(len(found), 2))
    assert counts == {0, 1, 2}


def test_backtracks_count_wrong_guesses():
    # With one solution any other branch of a guess is wrong: there are as many as were not taken.
    hard = sudoku.parse(HARD)
    solved = sudoku.solve(hard)
    assert solved.backtracks > 100
    digits = np.array([0, 3, 1, 2, 9, 8, 7, 6, 5, 4])
    assert sudoku.solve(digits[hard]).backtracks == solved.backtracks
    assert sudoku.search(hard, rng=np.random.default_rng(0)).backtracks == solved.backtracks
    assert sudoku.solve(solved.answer).backtracks == 0


def test_a_search_gives_up_in_the_end(monkeypatch):
    monkeypatch.setattr(sudoku, "MOST_BACKTRACKS", 20)
    with pytest.raises(UserError, match="gave up after 20 wrong guesses; give more clues"):
        sudoku.solve(sudoku.parse(HARD))


@pytest.mark.parametrize("size", [4, 6, 9])
def test_made_puzzles_have_one_solution_and_no_clue_too_many(size):
    for index in range(2):
        puzzle = sudoku.make(size, seed=1, index=index)
        assert keeps_the_rules(puzzle.answer)
        clues = np.argwhere(puzzle.question)
        assert sudoku.FEWEST_CLUES[size] <= len(clues) < size * size / 2
        np.testing.assert_array_equal(
            puzzle.question[puzzle.question > 0], puzzle.answer[puzzle.question > 0]
        )
        np.testing.assert_array_equal(sudoku.solve(puzzle.question).answer, puzzle.answer)
        for row, column in clues:
            fewer = puzzle.question.copy()
            fewer[row, column] = 0
            assert len(sudoku.search(fewer).solutions) == 2


def test_a_puzzle_is_a_function_of_seed_and_index():
    puzzles = [sudoku.make(6, seed=s, index=i).question.tobytes() for s in (3, 4) for i in range(3)]
    assert len(set(puzzles)) == 6
    assert sudoku.make(6, seed=4, index=1).question.tobytes() == puzzles[4]


def test_clues_and_difficulty_as_asked():
    assert np.count_nonzero(sudoku.make(9, seed=0, clues=40).question) == 40
    assert np.count_nonzero(sudoku.make(4, seed=0, clues=16).question) == 16
    drawn = {
        np.count_nonzero(sudoku.make(4, seed=0, index=i, clues=(6, 8)).question) for i in range(20)
    }
    assert drawn == {6, 7, 8}
    assert sudoku.make(6, seed=0, least_backtracks=3).backtracks >= 3


@pytest.mark.parametrize("size", [4, 6, 9])
def test_a_symmetry_maps_question_and_answer_alike(size):
    puzzle = sudoku.make(size, seed=0)
    rng = np.random.default_rng(0)
    seen, transposed = set(), set()
    for _ in range(30):
        change = sudoku.symmetry(size, rng)
        question, answer = change(puzzle.question), change(puzzle.answer)
        assert keeps_the_rules(answer)
        np.testing.assert_array_equal(sudoku.solve(question).answer, answer)
        assert np.count_nonzero(question) == np.count_nonzero(puzzle.question)
        seen.add(answer.tobytes())
        # Two cells of one row end up in one row, or in one column.
        transposed.add(bool(change.cells[0] % size == change.cells[1] % size))
    assert len(seen) > 20
    assert transposed == ({False} if size == 6 else {False, True})


def test_tokens():
    puzzle = sudoku.make(4, seed=0)
    rows = sudoku.puzzle_rows([puzzle, puzzle])
    assert [x.dtype for x in rows] == [np.int32] * 3
    assert rows.tokens.shape == rows.labels.shape == (2, 16) and rows.puzzle.tolist() == [0, 0]
    np.testing.assert_array_equal(rows.tokens[1].reshape(4, 4), puzzle.question + 1)
    np.testing.assert_array_equal(rows.labels[1].reshape(4, 4), puzzle.answer + 1)
    assert rows.tokens.min() == 1 and rows.labels.max() == 5 < sudoku.vocabulary(4)


def test_a_set_holds_a_group_for_each_puzzle():
    puzzles = [sudoku.make(4, seed=0, index=i) for i in range(3)]
    made = sudoku.puzzle_set(puzzles, augmentations=4, seed=9)
    assert made.inputs.shape == made.labels.shape == (15, 16)
    assert made.group_indices.tolist() == [0, 5, 10, 15]
    assert made.puzzle_indices.tolist() == list(range(16))
    np.testing.assert_array_equal(made.inputs[::5], sudoku.puzzle_rows(puzzles).tokens)
    for question, answer in zip(made.inputs, made.labels, strict=True):
        solved = sudoku.solve(question.reshape(4, 4).astype(np.int64) - 1)
        np.testing.assert_array_equal(solved.answer.reshape(-1) + 1, answer)
    again = sudoku.puzzle_set(puzzles, augmentations=4, seed=9)
    np.testing.assert_array_equal(again.inputs, made.inputs)
    assert np.any(sudoku.puzzle_set(puzzles, augmentations=4, seed=8).inputs != made.inputs)


@pytest.mark.parametrize(
    "puzzle, message",
    [
        ("12 34", "expected 16, 36 or 81 cells, got 4"),
        ("1234 34x2 .... ....", r"a cell must be a digit, 0 or '\.', got"),
        ("5... .... .... ....", r"digits are 1 \.\. 4 .* got 5 in row 1, column 1"),
        ("1... ...2 .... 1...", "no solution, column 1 has the digit 1 twice"),
        ("1..1 .... .... ....", "no solution, row 1 has the digit 1 twice"),
        ("3... .3.. .... ....", "no solution, box 1 has the digit 3 twice"),
        ("12.. .... ..43 ....", "exactly one solution; this one with 4 clues has more than one"),
        ("12.. ..3. ...4 ....", "this one with 4 clues has no solution"),
        (np.zeros((4, 6), int), r"of shape \(4, 4\), \(6, 6\) or \(9, 9\), got \(4, 6\)"),
        (np.zeros((5, 5), int), r"got \(5, 5\)"),
        (np.zeros((4, 4)), "must hold integers, got float64"),
        (EMPTY - 1, r"got -1 in row 1, column 1"),
    ],
)
def test_malformed_puzzles_are_refused(puzzle, message):
    with pytest.raises(UserError, match=message):
        sudoku.solve(sudoku.parse(puzzle) if isinstance(puzzle, str) else puzzle)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"size": 5}, "size must be 4, 6 or 9, got 5"),
        ({"size": 9, "clues": 16}, r"size 9 needs 17 \.\. 81 clues, got 16"),
        ({"size": 4, "clues": (9, 8)}, r"needs 4 \.\. 16 clues, got \(9, 8\)"),
        ({"size": 4, "least_backtracks": 1000}, "found no puzzle of size 4 with few clues and at"),
    ],
)
def test_impossible_wishes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sudoku.make(**arguments, seed=0)
