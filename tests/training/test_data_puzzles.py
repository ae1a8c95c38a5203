"""Puzzles in groups."""

import numpy as np
import pytest

from jaxrec.training.data.puzzles import DIHEDRAL_INVERSE, dihedral, single_puzzles


def test_examples_one_after_another_make_up_groups():
    tokens = np.arange(12).reshape(6, 2)
    made = single_puzzles(tokens, tokens + 1, copies=3)
    assert made.group_indices.tolist() == [0, 3, 6]
    assert made.puzzle_indices.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert made.puzzle_identifiers.tolist() == [0] * 6


def test_what_makes_up_no_groups_is_refused():
    with pytest.raises(ValueError, match=r"in groups of 4, got \(6, 2\) and \(6, 2\)"):
        single_puzzles(np.zeros((6, 2)), np.zeros((6, 2)), copies=4)
    with pytest.raises(ValueError, match=r"both be \(examples s\), .* got \(6, 2\) and \(6, 3\)"):
        single_puzzles(np.zeros((6, 2)), np.zeros((6, 3)))


def test_the_eight_symmetries_of_a_rectangle_and_what_undoes_them():
    grid = np.arange(6).reshape(2, 3)
    seen = [dihedral(grid, which) for which in range(8)]
    assert [x.tolist() for x in seen] == [
        [[0, 1, 2], [3, 4, 5]],
        [[2, 5], [1, 4], [0, 3]],
        [[5, 4, 3], [2, 1, 0]],
        [[3, 0], [4, 1], [5, 2]],
        [[2, 1, 0], [5, 4, 3]],
        [[3, 4, 5], [0, 1, 2]],
        [[0, 3], [1, 4], [2, 5]],
        [[5, 2], [4, 1], [3, 0]],
    ]
    for x, inverse in zip(seen, DIHEDRAL_INVERSE, strict=True):
        np.testing.assert_array_equal(dihedral(x, inverse), grid)
