"""Coordinates of position and loop: added, joined, shifted by the loop."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.coordinates import Coordinates
from tests import references

X = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)
POSITION = np.array([[0, 1, 2], [5, 0, 1]], np.int32)


def wave(position):
    return references.sinusoid(position, 6, np.dtype(np.float64))


def given(t, length=8, **options):
    """x with the coordinates of loop t of 4, and the module."""
    module = Coordinates(6, 4, rngs=nnx.Rngs(0), **options)
    fixed = module.positions(POSITION, jnp.asarray(X))
    return module(X, POSITION, fixed, jnp.int32(t), length), module


@pytest.mark.parametrize("step", ["learned", "sinusoid"])
@pytest.mark.parametrize("join", ["add", "concat"])
def test_equal_the_formula(step, join):
    got, module = given(2, step=step, join=join)
    p = np.array([[wave(p) for p in row] for row in POSITION])
    e = np.asarray(module.table[...])[2] * 6**0.5 if step == "learned" else wave(2)
    if join == "add":
        want = X + p + e
    else:
        wide = np.concatenate([X, p, np.broadcast_to(e, X.shape)], axis=-1)
        want = wide @ np.asarray(module.join.kernel[...], np.float64)
    np.testing.assert_allclose(got, want, atol=5e-6)


def test_positions_move_through_the_length_with_the_loops():
    for t, shift in ((0, 0), (1, 2), (3, 7)):  # floor(10 t / 4)
        got, _ = given(t, length=10, start="step", step="sinusoid")
        p = np.array([[wave(p + shift) for p in row] for row in POSITION])
        np.testing.assert_allclose(got, X + p + wave(t), atol=5e-6)


def test_the_table_has_the_scale_of_an_embedding():
    table = Coordinates(64, 200, rngs=nnx.Rngs(0)).table[...]
    assert np.std(table) == pytest.approx(64**-0.5, rel=0.05)
