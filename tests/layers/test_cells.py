"""The cell's start, its numbers and its state; those of its recurrence are in the laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.cells import SLSTM
from tests import references

INIT = jax.nn.initializers.normal()


def build(inner=6, heads=2):
    return SLSTM(8, inner, heads, init=INIT, rngs=nnx.Rngs(0))


def test_forget_gates_begin_open():
    bias = build().input.bias[...]
    np.testing.assert_array_equal(bias[2], [[3, 4.5, 6]] * 2)
    np.testing.assert_array_equal(np.delete(bias, 2, axis=0), np.zeros((3, 2, 3)))


def test_equals_the_loop():
    cell = build()
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    h, _ = jax.jit(cell)(x, cell.init_state(2))
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(cell)[1]))
    gates = references.linear(params["input"], x)
    never = np.zeros((2, 5), bool)
    want, *_ = references.slstm(gates, params["recurrent"], *np.zeros((3, 2, 2, 3)), never)
    np.testing.assert_allclose(h, want.reshape(2, 5, 6), atol=1e-6)


def test_the_state_is_float32_whatever_the_activations():
    cell = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), build())
    x = jax.ShapeDtypeStruct((2, 5, 8), jnp.bfloat16)
    h, state = jax.eval_shape(lambda cell, x: cell(x, cell.init_state(2)), cell, x)
    assert (h.shape, h.dtype) == ((2, 5, 6), jnp.bfloat16)
    assert all((leaf.shape, leaf.dtype) == ((2, 2, 3), jnp.float32) for leaf in state)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="inner width 6 does not divide into 4 heads"):
        build(heads=4)
