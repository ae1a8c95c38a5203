"""Where documents begin, and the positions inside them."""

import jax
import numpy as np

from jaxrec.ops import segments

IDS = np.array([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 3, 3]], np.int32)
resets = jax.jit(segments.resets)
positions = jax.jit(segments.positions)


def test_the_first_token_of_a_row_begins_a_segment():
    want = np.array([[1, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(resets(IDS), want)


def test_a_row_may_go_on_with_the_segment_before_it():
    got = resets(IDS, np.array([1, 2], np.int32))
    np.testing.assert_array_equal(got[:, 0], [False, True])
    np.testing.assert_array_equal(got[:, 1:], resets(IDS)[:, 1:])


def test_positions_count_from_the_last_reset():
    got = positions(resets(IDS), np.zeros(2, np.int32))
    np.testing.assert_array_equal(got, [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]])


def test_positions_go_on_from_where_they_were():
    reset = np.array([[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    got = positions(reset, np.array([5, 7, 9], np.int32))
    np.testing.assert_array_equal(got, [[5, 6, 0, 1], [7, 8, 9, 10], [0, 1, 2, 3]])
    assert got.dtype == np.int32
