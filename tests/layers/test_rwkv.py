"""The block's start, its state and its place on devices; its values are in the laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.rwkv import RWKVBlock, TimeMixing, token_shift
from jaxrec.training.sharding import build_mesh
from tests.ops.time.test_sharded import collectives


def build(cls=RWKVBlock, *sizes):
    return jax.jit(lambda key: cls(8, 6, *sizes, rngs=nnx.Rngs(key)))(jax.random.key(0))


def test_the_shift_is_zero_at_resets_and_carries_the_last_input():
    x = np.arange(8, dtype=np.float32).reshape(1, 4, 2)
    before, reset = np.full((1, 2), 9, np.float32), np.array([[False, False, True, False]])
    shift, last = token_shift(x, before, reset)
    np.testing.assert_array_equal(shift, [[[9, 9], [0, 1], [0, 0], [4, 5]]])
    np.testing.assert_array_equal(last, [[6, 7]])
    shift, _ = token_shift(x, before, None)
    np.testing.assert_array_equal(shift[0, 2], [2, 3])


def test_a_block_begins_as_the_identity():
    block = build(RWKVBlock, 10)
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    y, _ = jax.jit(block)(x, block.init_state(2))
    np.testing.assert_array_equal(y, x)


def test_the_state_is_float32_whatever_the_activations():
    block = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), build(RWKVBlock, 10))
    x = jax.ShapeDtypeStruct((2, 5, 8), jnp.bfloat16)
    y, state = jax.eval_shape(lambda block, x: block(x, block.init_state(2)), block, x)
    assert y.dtype == jnp.bfloat16
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [(2, 8), *[(2, 6)] * 3, (2, 8)]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("time", [16, 15])
def test_mixing_over_time_gathers_no_sequence(time):
    """15 steps cannot be split evenly: correct, and left to the compiler."""
    layer = build(TimeMixing)
    layer = jax.tree.map(lambda leaf: leaf + 0.5, layer)
    x = np.random.default_rng(0).normal(size=(2, time, 8)).astype(np.float32)
    state = layer.init_state(2)
    want = jax.jit(layer)(x, state)
    devices = build_mesh("seq=4")
    with jax.set_mesh(devices):
        place = jax.NamedSharding(devices, jax.P(None, "seq") if time == 16 else jax.P())
        program = jax.jit(layer, in_shardings=(place, None)).lower(x, state).compile()
        got = program(jax.device_put(x, place), state)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-6 * np.max(np.abs(right)))
    if time == 16:  # the maps of both scans travel, and single steps to the neighbours
        _, largest = collectives(program)
        assert largest <= 4 * 2 * 2 * 2 * 6 < x.size
