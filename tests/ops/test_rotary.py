"""Rotary positions: both pairings against complex numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops import rotary
from tests import references

POSITIONS = np.array([[0, 1, 2, 500], [3, 4, 0, 1]], np.int32)
pairings = pytest.mark.parametrize("pairing", ["interleaved", "half"])


@functools.partial(jax.jit, static_argnames=("pairing", "base"))
def rotate(x, positions, pairing, base=10000.0):
    return rotary.rotate(x, rotary.rotation(positions, x.shape[-1], base), pairing)


def heads(width=8, seed=0):
    return np.random.default_rng(seed).normal(size=(2, 4, 3, width)).astype(np.float32)


@pairings
@pytest.mark.parametrize("width", [2, 8])
def test_pairs_are_complex_numbers_that_turn(pairing, width):
    x = heads(width)
    got = rotate(x, POSITIONS, pairing)
    for b, t in np.ndindex(2, 4):
        want = references.rotate(x[b, t].astype(np.float64), POSITIONS[b, t], 10000.0, pairing)
        # float32 angles: 500 radians are known to 500 * 2^-24 = 3e-5.
        atol = 10 * max(POSITIONS[b, t], 4) * 2.0**-24
        np.testing.assert_allclose(got[b, t], want, atol=atol)


def test_the_pairings_differ_by_a_permutation_of_the_channels():
    x, order = heads(), np.array([0, 2, 4, 6, 1, 3, 5, 7])
    interleaved = np.asarray(rotate(x, POSITIONS, "interleaved"))
    half = np.asarray(rotate(x[..., order], POSITIONS, "half"))
    np.testing.assert_array_equal(half, interleaved[..., order])
    assert np.any(np.asarray(rotate(x, POSITIONS, "half")) != interleaved)


@pairings
def test_scores_depend_on_the_distance_only(pairing):
    q, k = heads(seed=1), heads(seed=2)

    def scores(shift):
        q_turned = np.asarray(rotate(q, POSITIONS + shift, pairing))
        k_turned = np.asarray(rotate(k, POSITIONS[:, ::-1] + shift, pairing))
        return np.sum(q_turned * k_turned, axis=-1)

    # Angles up to 540 radians are known to 3e-5; scores sum 8 products of numbers around 1.
    np.testing.assert_allclose(scores(0), scores(np.int32(40)), atol=1e-3)


@pairings
def test_position_zero_and_lengths_are_left_alone(pairing):
    x = heads()
    got = rotate(x, POSITIONS, pairing)
    np.testing.assert_array_equal(got[0, 0], x[0, 0])
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)


@pairings
def test_bfloat16_is_turned_in_float32_and_returned(pairing):
    x = heads().astype(jnp.bfloat16)
    got = rotate(x, POSITIONS, pairing)
    want = rotate(x.astype(np.float32), POSITIONS, pairing)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="head width must be even, got 7"):
        rotary.rotation(POSITIONS, 7, 10000.0)
    with pytest.raises(ValueError, match=r"pairing must be one of .*'half'.*, got 'neox'"):
        rotary.rotate(heads(), rotary.rotation(POSITIONS, 8, 10000.0), "neox")
    with pytest.raises(ValueError, match=r"rotate: x must be \(b t h k\) and angles"):
        rotary.rotate(heads()[..., :6], rotary.rotation(POSITIONS, 8, 10000.0), "half")


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_channels_without_an_angle_stay(pairing):
    x, angles = heads(), rotary.rotation(POSITIONS, 4, 10000.0)
    got = rotary.rotate(x, angles, pairing)
    np.testing.assert_array_equal(got[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(got[..., :4], rotary.rotate(x[..., :4], angles, pairing))
    assert np.any(got[..., :4] != x[..., :4])
