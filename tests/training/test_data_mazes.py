"""Mazes: one shortest path, which the answer marks."""

import itertools

import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.training.data import mazes

QUESTION = """
S  #
## #
  G#
"""
ANSWER = """
Soo#
##o#
  G#
"""


def shortest_paths(grid):
    """Length and number of shortest paths, by powers of the adjacency matrix."""
    cells = [tuple(cell) for cell in np.argwhere(grid != mazes.WALL)]
    adjacent = np.array([[abs(a - c) + abs(b - d) == 1 for c, d in cells] for a, b in cells])
    start, goal = (
        cells.index(tuple(np.argwhere(grid == token)[0])) for token in (mazes.START, mazes.GOAL)
    )
    ways = np.eye(len(cells))[start]
    for steps in itertools.count(1):
        ways = ways @ adjacent
        if ways[goal]:
            return steps, int(ways[goal])


def test_a_maze_that_one_can_see():
    solved = mazes.solve(mazes.parse(QUESTION))
    assert mazes.draw(solved.answer) == ANSWER.strip("\n")
    assert solved.length == 4
    np.testing.assert_array_equal(solved.question, mazes.parse(mazes.draw(solved.question)))
    assert solved.question[0].tolist() == [3, 2, 2, 1] and solved.answer[0].tolist() == [3, 5, 5, 1]


@pytest.mark.parametrize("shape", [(1, 2), (1, 9), (5, 4), (9, 9), (8, 12)])
@pytest.mark.parametrize("openings", [0.0, 0.2])
def test_there_is_one_shortest_path_and_the_answer_is_it(shape, openings):
    for index in range(3):
        maze = mazes.make(*shape, seed=1, index=index, openings=openings)
        assert maze.question.shape == shape
        assert shortest_paths(maze.question) == (maze.length, 1)
        path = maze.answer == mazes.PATH
        assert path.sum() == maze.length - 1
        np.testing.assert_array_equal(maze.question[path], mazes.OPEN)
        np.testing.assert_array_equal(maze.question[~path], maze.answer[~path])
        along = np.where(path | (maze.question >= mazes.START), maze.question, mazes.WALL)
        assert shortest_paths(along) == (maze.length, 1)


def test_without_openings_there_are_no_ways_round():
    def surplus(maze):
        free = maze.question != mazes.WALL
        edges = np.sum(free[1:] & free[:-1]) + np.sum(free[:, 1:] & free[:, :-1])
        return edges - (free.sum() - 1)  # of a connected graph: 0 says that it is a tree

    assert surplus(mazes.make(9, 9, seed=0, openings=0.0)) == 0
    assert surplus(mazes.make(9, 9, seed=0, openings=0.3)) > 0


def test_long_paths_on_demand():
    assert mazes.make(12, 12, seed=0, least_length=30).length >= 30


def test_a_maze_is_a_function_of_seed_and_index():
    made = [
        mazes.make(6, 6, seed=seed, index=index).question.tobytes()
        for seed, index in itertools.product((0, 1), range(3))
    ]
    assert len(set(made)) == 6
    assert mazes.make(6, 6, seed=1, index=2).question.tobytes() == made[5]


def test_rows_and_groups():
    made = [mazes.make(4, 4, seed=0, index=index) for index in range(2)]
    rows = mazes.puzzle_rows(made)
    assert rows.tokens.shape == (2, 16) and {x.dtype for x in rows} == {np.dtype(np.int32)}
    np.testing.assert_array_equal(rows.labels[1].reshape(4, 4), made[1].answer)
    np.testing.assert_array_equal(mazes.puzzle_set(made).inputs, rows.tokens)
    turned = mazes.puzzle_set(made, symmetries=True)
    assert turned.group_indices.tolist() == [0, 8, 16]
    for question, answer in zip(turned.inputs, turned.labels, strict=True):
        solved = mazes.solve(question.reshape(4, 4))
        np.testing.assert_array_equal(solved.answer.reshape(-1), answer)
    assert len(np.unique(turned.inputs[:8], axis=0)) > 4


@pytest.mark.parametrize(
    "text, message",
    [
        ("S G\n  ", r"same length, at least 1, got \[3, 2\]"),
        ("", r"at least 1, got \[0\]"),
        ("S.G", r"characters are '# SGo', got '\.'"),
        ("SoG", "tokens of a question are .* got 5"),
        ("S  ", "expected one start and one goal, got 1 and 0"),
        ("SSG", "expected one start and one goal, got 2 and 1"),
        ("S#G", "no path leads from start to goal"),
        ("S \n G", "expected exactly one shortest path from start to goal, got several"),
    ],
)
def test_malformed_mazes_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        mazes.solve(mazes.parse(text))


def test_grids_of_other_kinds_are_refused():
    with pytest.raises(UserError, match=r"must be \(x y\) integers, got float64 \(2, 2\)"):
        mazes.solve(np.ones((2, 2)))
    with pytest.raises(UserError, match=r"got int64 \(4,\)"):
        mazes.solve(np.ones(4, np.int64))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"height": 1, "width": 1}, "needs at least two cells, got 1 x 1"),
        ({"openings": 1.5}, r"openings must be within \[0, 1\], got 1.5"),
        ({"least_length": 0}, "least_length must be at least 1, got 0"),
        ({"least_length": 20}, "found no 4 x 4 maze .* of at least 20 steps in 200 mazes"),
    ],
)
def test_impossible_wishes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        mazes.make(**({"height": 4, "width": 4} | arguments), seed=0)


def test_only_squares_have_eight_symmetries():
    with pytest.raises(ValueError, match="need square mazes, got 3 x 5"):
        mazes.puzzle_set([mazes.make(3, 5, seed=0)], symmetries=True)
