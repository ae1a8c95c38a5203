"""Puzzles in groups."""

import numpy as np
import pytest

from jaxrec.training.data.puzzles import single_puzzles


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
