"""Mazes of any size with exactly one shortest path from start to goal.

A grid is an integer array (x y) of tokens: wall, open, start, goal, and in answers the path between
start and goal. Steps go to the four neighbours; what lies outside is wall.

Wang et al., Hierarchical reasoning model (2025), arXiv:2506.21734, section 3.2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrec.errors import UserError
from jaxrec.models.hrm import Rows
from jaxrec.training.data.puzzles import PuzzleSet, dihedral, single_puzzles

CHARACTERS = "# SGo"
WALL, OPEN, START, GOAL, PATH = range(1, 6)
"""Tokens, 1 + the place in CHARACTERS; 0 is padding."""
VOCABULARY = 6
ATTEMPTS = 200
"""Mazes that `make` tries before it says that it cannot find what was asked for."""

Cell = tuple[int, int]


class Maze(NamedTuple):
    """A maze with its only shortest path."""

    question: np.ndarray  # int64 (x y)
    answer: np.ndarray  # int64 (x y): the same with PATH between START and GOAL
    length: int  # steps from start to goal


class Distances(NamedTuple):
    """How far the cells are from a start."""

    steps: dict[Cell, int]  # of those that can be reached, nearest first
    paths: dict[Cell, int]  # how many shortest paths lead there; 2 stands for several
    before: dict[Cell, Cell]  # the cell before, on one of them


def parse(text: str) -> np.ndarray:
    """Reads a grid, int64 (x y), a line for each row, of the characters "# SGo".

    Raises:
      UserError: lines have different lengths, or a character is none of these.
    """
    lines = text.strip("\n").split("\n")
    if len({len(line) for line in lines}) != 1 or not lines[0]:
        raise UserError(
            "Maze: all lines must have the same length, at least 1, got"
            f" {[len(line) for line in lines]}."
        )
    odd = sorted(set(text) - set(CHARACTERS) - {"\n"})
    if odd:
        raise UserError(f"Maze: characters are {CHARACTERS!r}, got {odd[0]!r}.")
    return np.array([[1 + CHARACTERS.index(c) for c in line] for line in lines])


def draw(grid: np.ndarray) -> str:
    """The grid as text; the inverse of `parse`."""
    return "\n".join("".join(CHARACTERS[token - 1] for token in row) for row in grid)


def distances(free: np.ndarray, start: Cell) -> Distances:
    """Steps and shortest paths from a cell to all cells of free, bool (x y), that it reaches."""
    steps, paths, before = {start: 0}, {start: 1}, {start: start}
    front = [start]
    while front:
        following = []
        for cell in front:
            for other in _neighbours(cell, free.shape):
                if not free[other]:
                    continue
                if other not in steps:
                    steps[other], paths[other], before[other] = steps[cell] + 1, 0, cell
                    following.append(other)
                if steps[other] == steps[cell] + 1:
                    paths[other] = min(paths[other] + paths[cell], 2)
        front = following
    return Distances(steps, paths, before)


def solve(question: np.ndarray) -> Maze:
    """Finds the shortest path of a maze that has exactly one.

    Raises:
      UserError: the grid holds other tokens than those of a question, not one start and one goal,
        or there are no or several shortest paths.
    """
    question = np.asarray(question)
    if question.ndim != 2 or not np.issubdtype(question.dtype, np.integer):
        raise UserError(
            f"Maze: a grid must be (x y) integers, got {question.dtype} {question.shape}."
        )
    odd = np.setdiff1d(question, (WALL, OPEN, START, GOAL))
    if odd.size:
        raise UserError(
            f"Maze: tokens of a question are {WALL} wall, {OPEN} open, {START} start and {GOAL}"
            f" goal, got {odd[0]}."
        )
    ends = [list(zip(*np.nonzero(question == token), strict=True)) for token in (START, GOAL)]
    if [len(cells) for cells in ends] != [1, 1]:
        raise UserError(
            f"Maze: expected one start and one goal, got {len(ends[0])} and {len(ends[1])}."
        )
    (start,), (goal,) = ends
    found = distances(question != WALL, start)
    if goal not in found.steps:
        raise UserError("Maze: no path leads from start to goal.")
    if found.paths[goal] > 1:
        raise UserError("Maze: expected exactly one shortest path from start to goal, got several.")
    answer = question.astype(np.int64)
    cell = found.before[goal]
    while cell != start:
        answer[cell] = PATH
        cell = found.before[cell]
    return Maze(question.astype(np.int64), answer, found.steps[goal])


def make(
    height: int,
    width: int,
    *,
    seed: int,
    index: int = 0,
    openings: float = 0.05,
    least_length: int | None = None,
) -> Maze:
    """Makes a maze with exactly one shortest path, a function of its arguments.

    Corridors grow from a random cell, each new cell beside exactly one open cell, so that there is
    one path between any two; then walls are opened, which makes ways round. Start and goal are
    drawn from the pairs of cells that still have only one shortest path.

    Args:
      height: rows x of the grid.
      width: columns y of the grid.
      seed: of NumPy's `default_rng`, together with the index.
      index: which of the mazes of this seed.
      openings: share of the walls that are opened, in [0, 1].
      least_length: least steps from start to goal; None: such that half of the cells are nearer.

    Raises:
      ValueError: the grid has no two cells, the share is none, or no such maze was found.
    """
    if height < 1 or width < 1 or height * width < 2:
        raise ValueError(f"Maze: needs at least two cells, got {height} x {width}.")
    if not 0 <= openings <= 1:
        raise ValueError(f"Maze: openings must be within [0, 1], got {openings}.")
    if least_length is not None and least_length < 1:
        raise ValueError(f"Maze: least_length must be at least 1, got {least_length}.")
    rng = np.random.default_rng([seed, index])
    for _ in range(ATTEMPTS):
        free = _grow((height, width), rng)
        walls = np.argwhere(~free)
        opened = rng.permutation(walls)[: round(openings * len(walls))]
        free[opened[:, 0], opened[:, 1]] = True
        cells = [(int(x), int(y)) for x, y in np.argwhere(free)]
        start = cells[rng.integers(len(cells))]
        found = distances(free, start)
        steps = sorted(found.steps.values())
        least = max(1, steps[len(steps) // 2]) if least_length is None else least_length
        goals = [
            cell for cell in found.steps if found.steps[cell] >= least and found.paths[cell] == 1
        ]
        if goals:
            question = np.where(free, OPEN, WALL)
            question[start], question[goals[rng.integers(len(goals))]] = START, GOAL
            return solve(question)
    raise ValueError(
        f"Maze: found no {height} x {width} maze with {openings} of its walls opened and one"
        f" shortest path of at least {least_length or 1} steps in {ATTEMPTS} mazes; ask for"
        " shorter paths or fewer openings."
    )


def puzzle_rows(mazes: Sequence[Maze]) -> Rows[np.ndarray]:
    """Mazes of one size as rows of tokens; all have vector 0."""
    return Rows(
        np.stack([maze.question.reshape(-1) for maze in mazes]).astype(np.int32),
        np.stack([maze.answer.reshape(-1) for maze in mazes]).astype(np.int32),
        np.zeros(len(mazes), np.int32),
    )


def puzzle_set(mazes: Sequence[Maze], *, symmetries: bool = False) -> PuzzleSet:
    """Mazes of one size, a group each; with symmetries its eight turned and mirrored copies.

    Raises:
      ValueError: symmetries are asked for of mazes that are not square.
    """
    height, width = mazes[0].question.shape
    if symmetries and height != width:
        raise ValueError(f"Maze: symmetries need square mazes, got {height} x {width}.")
    copies = 8 if symmetries else 1
    rows = puzzle_rows(
        [
            Maze(dihedral(maze.question, i), dihedral(maze.answer, i), maze.length)
            for maze in mazes
            for i in range(copies)
        ]
    )
    return single_puzzles(rows.tokens.astype(np.uint8), rows.labels.astype(np.uint8), copies=copies)


def _neighbours(cell: Cell, shape: tuple[int, ...]) -> list[Cell]:
    x, y = cell
    around = ((x - 1, y), (x, y - 1), (x, y + 1), (x + 1, y))
    return [(i, j) for i, j in around if 0 <= i < shape[0] and 0 <= j < shape[1]]


def _grow(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Open cells, bool (x y), that are a tree: the way back is taken where nothing can grow."""
    free = np.zeros(shape, bool)
    at = (int(rng.integers(shape[0])), int(rng.integers(shape[1])))
    free[at] = True
    way = [at]
    while way:
        room = [
            cell
            for cell in _neighbours(way[-1], shape)
            if not free[cell] and sum(free[other] for other in _neighbours(cell, shape)) == 1
        ]
        if room:
            way.append(room[rng.integers(len(room))])
            free[way[-1]] = True
        else:
            way.pop()
    return free
