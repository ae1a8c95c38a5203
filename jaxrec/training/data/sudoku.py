"""Sudoku: a solver, a generator of puzzles with one solution, and the symmetries of the game.

A grid is an integer array (n n), n = 4, 6 or 9, of digits 1 .. n and 0 for a blank cell; no digit
may stand twice in a row, a column or a box. A puzzle's difficulty is the number of wrong guesses of
a search that always goes on at a cell with the fewest candidates.

Wang et al., Hierarchical reasoning model (2025), arXiv:2506.21734, section 3.2.
"""

from typing import NamedTuple

import numpy as np

from jaxrec.errors import UserError
from jaxrec.models.hrm import Rows
from jaxrec.training.data.puzzles import PuzzleSet, single_puzzles

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Rows and columns of a box, by the size of the grid."""
FEWEST_CLUES = {4: 4, 6: 8, 9: 17}
"""No puzzle with fewer clues has only one solution."""
ATTEMPTS = 200
"""Grids that `make` tries before it says that it cannot find what was asked for."""
MOST_BACKTRACKS = 1_000_000
"""Wrong guesses after which a search gives up: far more than puzzles with a solution were seen to
need, but a grid without one may need more than anybody waits for.
"""


class Search(NamedTuple):
    """What a search for solutions found."""

    solutions: list[np.ndarray]  # int64 (n n) each
    backtracks: int  # guesses below which no solution was found


class Sudoku(NamedTuple):
    """A puzzle with its only solution."""

    question: np.ndarray  # int64 (n n)
    answer: np.ndarray  # int64 (n n)
    backtracks: int  # its difficulty


class Symmetry(NamedTuple):
    """A map of grids to grids that keeps the rules: digits[grid.flat[cells]]."""

    cells: np.ndarray  # int64 (n*n): where each cell of the new grid comes from
    digits: np.ndarray  # int64 (n+1): what becomes of a digit; blank stays blank

    def __call__(self, grid: np.ndarray) -> np.ndarray:
        """Maps a grid (n n)."""
        return self.digits[grid.reshape(-1)[self.cells]].reshape(grid.shape)


def parse(text: str) -> np.ndarray:
    """Reads a grid, int64 (n n), row by row: digits, and 0 or . for blank; spaces do not count.

    Raises:
      UserError: there are not 16, 36 or 81 cells, or a cell holds something else.
    """
    cells = "".join(text.split()).replace(".", "0")
    size = {n * n: n for n in BOXES}.get(len(cells))
    if size is None:
        raise UserError(f"Sudoku: expected 16, 36 or 81 cells, got {len(cells)}.")
    if not (cells.isascii() and cells.isdigit()):
        raise UserError(f"Sudoku: a cell must be a digit, 0 or '.', got {text!r}.")
    return check(np.array([int(cell) for cell in cells]).reshape(size, size))


def check(grid: np.ndarray) -> np.ndarray:
    """Returns the grid as int64 (n n) if its digits keep the rules so far.

    Raises:
      UserError: it has another shape or dtype, a digit out of range, or a digit twice in a row, a
        column or a box.
    """
    grid = np.asarray(grid)
    size = len(grid) if grid.ndim else 0
    if size not in BOXES or grid.shape != (size, size):
        raise UserError(
            f"Sudoku: a grid must be of shape (4, 4), (6, 6) or (9, 9), got {grid.shape}."
        )
    if not np.issubdtype(grid.dtype, np.integer):
        raise UserError(f"Sudoku: a grid must hold integers, got {grid.dtype}.")
    outside = np.argwhere((grid < 0) | (grid > size))
    if len(outside):
        row, column = outside[0]
        raise UserError(
            f"Sudoku: digits are 1 .. {size} and 0 for blank, got {grid[row, column]} in row"
            f" {row + 1}, column {column + 1}."
        )
    for name, unit_of in zip(("row", "column", "box"), _units(size), strict=True):
        counts = np.zeros((size, size + 1), np.int64)
        np.add.at(counts, (unit_of, grid.reshape(-1)), 1)
        twice = np.argwhere(counts[:, 1:] > 1)
        if len(twice):
            unit, digit = twice[0] + 1
            raise UserError(f"Sudoku: no solution, {name} {unit} has the digit {digit} twice.")
    return grid.astype(np.int64)


def search(puzzle: np.ndarray, *, most: int = 2, rng: np.random.Generator | None = None) -> Search:
    """Looks for solutions, at a cell with the fewest candidates first.

    Args:
      puzzle: (n n).
      most: the search ends after so many solutions; 2 are enough to know that there are several.
      rng: tries the candidates of a cell in random order; in the order of digits if None.

    Returns:
      The solutions, and the guesses that led to none. If there is one solution, these are all the
      wrong guesses of the whole search, which do not depend on the order of the digits.

    Raises:
      UserError: the puzzle breaks the rules, see `check`, or the search gave up.
    """
    puzzle = check(puzzle)
    size = len(puzzle)
    row_of, column_of, box_of = (unit_of.tolist() for unit_of in _units(size))
    cells = puzzle.reshape(-1).tolist()
    # Bit d - 1 of a unit: it still lacks digit d.
    rows, columns, boxes = ([(1 << size) - 1] * size for _ in range(3))
    solutions: list[np.ndarray] = []
    backtracks = 0

    def put(cell: int, bit: int) -> None:
        rows[row_of[cell]] ^= bit
        columns[column_of[cell]] ^= bit
        boxes[box_of[cell]] ^= bit

    def go_on(blank: list[int]) -> None:
        nonlocal backtracks
        if not blank:
            solutions.append(np.array(cells, np.int64).reshape(size, size))
            return
        fewest = size + 1
        for cell in blank:
            bits = rows[row_of[cell]] & columns[column_of[cell]] & boxes[box_of[cell]]
            if bits.bit_count() < fewest:
                fewest, here, candidates = bits.bit_count(), cell, bits
                if fewest <= 1:
                    break
        rest = [cell for cell in blank if cell != here]
        digits = [digit for digit in range(1, size + 1) if candidates >> (digit - 1) & 1]
        if rng is not None:
            rng.shuffle(digits)
        for digit in digits:
            before = len(solutions)
            cells[here] = digit
            put(here, 1 << (digit - 1))
            go_on(rest)
            put(here, 1 << (digit - 1))
            if len(solutions) >= most:
                return
            backtracks += fewest > 1 and len(solutions) == before
            if backtracks > MOST_BACKTRACKS:
                raise UserError(
                    f"Sudoku: gave up after {MOST_BACKTRACKS} wrong guesses; give more clues."
                )

    for cell, digit in enumerate(cells):
        if digit:
            put(cell, 1 << (digit - 1))
    go_on([cell for cell, digit in enumerate(cells) if not digit])
    return Search(solutions, backtracks)


def solve(puzzle: np.ndarray) -> Sudoku:
    """Solves a puzzle that has exactly one solution.

    Raises:
      UserError: it has none or several, or breaks the rules, see `check`.
    """
    found = search(puzzle)
    if len(found.solutions) != 1:
        count = "no solution" if not found.solutions else "more than one solution"
        raise UserError(
            "Sudoku: a puzzle must have exactly one solution; this one with"
            f" {np.count_nonzero(puzzle)} clues has {count}."
        )
    return Sudoku(check(puzzle), found.solutions[0], found.backtracks)


def make(
    size: int,
    *,
    seed: int,
    index: int = 0,
    clues: int | tuple[int, int] | None = None,
    least_backtracks: int = 0,
) -> Sudoku:
    """Makes a puzzle with exactly one solution, a function of its arguments.

    Args:
      size: n, 4, 6 or 9.
      seed: of NumPy's `default_rng`, together with the index.
      index: which of the puzzles of this seed.
      clues: cells that are not blank; a pair: least and most, of which one number is drawn. None:
        as few as possible, so that a second solution appears when any of them is taken away.
      least_backtracks: least difficulty.

    Raises:
      ValueError: no puzzle has this size or so many clues, or none like this was found.
    """
    if size not in BOXES:
        raise ValueError(f"Sudoku: size must be 4, 6 or 9, got {size}.")
    least, most = (clues, clues) if isinstance(clues, int) else clues or (FEWEST_CLUES[size],) * 2
    if not FEWEST_CLUES[size] <= least <= most <= size * size:
        raise ValueError(
            f"Sudoku: a puzzle of size {size} needs {FEWEST_CLUES[size]} .. {size * size} clues,"
            f" got {clues}."
        )
    rng = np.random.default_rng([seed, index])
    wanted = int(rng.integers(least, most + 1))
    for _ in range(ATTEMPTS):
        (answer,) = search(np.zeros((size, size), np.int64), most=1, rng=rng).solutions
        answer = symmetry(size, rng)(answer)
        question = _dig(answer, wanted, rng)
        if clues is None or np.count_nonzero(question) == wanted:
            puzzle = solve(question)
            if puzzle.backtracks >= least_backtracks:
                return puzzle
    raise ValueError(
        f"Sudoku: found no puzzle of size {size} with {clues or 'few'} clues and at least"
        f" {least_backtracks} backtracks in {ATTEMPTS} grids; ask for more clues or less"
        " difficulty."
    )


def symmetry(size: int, rng: np.random.Generator) -> Symmetry:
    """Draws one: digits permuted; boxes' rows, and the rows within, permuted, columns likewise; and
    rows exchanged with columns half of the time, where boxes are square.
    """
    height, width = BOXES[size]
    digits = np.concatenate([[0], 1 + rng.permutation(size)])
    rows = _order_of_lines(size, height, rng)
    columns = _order_of_lines(size, width, rng)
    cells = rows[:, None] * size + columns[None, :]
    if height == width and rng.random() < 0.5:
        cells = cells.T
    return Symmetry(cells.reshape(-1), digits)


def puzzle_rows(puzzles: list[Sudoku]) -> Rows[np.ndarray]:
    """Puzzles of one size as tokens: digit + 1, and 1 for blank; all have vector 0."""
    question = np.stack([puzzle.question.reshape(-1) for puzzle in puzzles])
    answer = np.stack([puzzle.answer.reshape(-1) for puzzle in puzzles])
    return Rows(
        (question + 1).astype(np.int32),
        (answer + 1).astype(np.int32),
        np.zeros(len(puzzles), np.int32),
    )


def puzzle_set(puzzles: list[Sudoku], *, augmentations: int = 0, seed: int = 0) -> PuzzleSet:
    """Puzzles of one size with augmented copies: a group each, the puzzle itself first.

    The published training set has 1000 copies of each puzzle, the test set none.
    """
    rows, copies = puzzle_rows(puzzles), augmentations + 1
    inputs, labels = (x.astype(np.uint8).repeat(copies, axis=0) for x in rows[:2])
    size = len(puzzles[0].question)
    for index in range(len(puzzles)):
        rng = np.random.default_rng([seed, index])
        for copy in range(index * copies + 1, (index + 1) * copies):
            change = symmetry(size, rng)
            digits = change.digits.astype(np.uint8) + 1  # of tokens: blank is 1
            inputs[copy] = digits[inputs[copy] - 1][change.cells]
            labels[copy] = digits[labels[copy] - 1][change.cells]
    return single_puzzles(inputs, labels, copies=copies)


def vocabulary(size: int) -> int:
    """Tokens of puzzles of this size: padding, blank, digits."""
    return size + 2


def _units(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and box of every cell, int64 (n*n)."""
    height, width = BOXES[size]
    row, column = np.divmod(np.arange(size * size), size)
    return row, column, row // height * (size // width) + column // width


def _order_of_lines(size: int, together: int, rng: np.random.Generator) -> np.ndarray:
    lines = rng.permutation(size // together)[:, None] * together
    within = np.stack([rng.permutation(together) for _ in range(size // together)])
    return (lines + within).reshape(-1)


def _dig(answer: np.ndarray, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """Blanks cells in random order while the solution stays the only one and clues are to spare."""
    question = answer.copy()
    left = answer.size
    for cell in rng.permutation(answer.size):
        if left == wanted:
            break
        digit = question.flat[cell]
        question.flat[cell] = 0
        if len(search(question).solutions) > 1:
            question.flat[cell] = digit
        else:
            left -= 1
    return question
