"""The RG-LRU's start, its bounded square root and its state; its values are in the laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.linear import truncated_normal
from jaxrec.layers.rglru import RGLRU, RecurrentBlock, bounded_sqrt
from tests import references

WIDTH = 1024


@pytest.fixture(scope="module")
def unit():
    return jax.jit(lambda key: RGLRU(WIDTH, 4, rngs=nnx.Rngs(key)))(jax.random.key(0))


def test_decays_begin_between_a_tenth_and_a_thousandth_per_step(unit):
    """softplus(Lambda) = -log(u) with u^2 uniform in [0.9^2, 0.999^2]."""
    u = np.exp(-references.softplus(np.asarray(unit.decay[...], np.float64)))
    assert np.min(u) >= 0.9 - 1e-6 and np.max(u) <= 0.999 + 1e-6
    assert np.min(u) < 0.901 and np.max(u) > 0.998
    quarters = np.histogram(u**2, bins=4, range=(0.9**2, 0.999**2))[0]
    # 256 expected in each; the deviation is 14.
    assert np.all(np.abs(quarters - WIDTH / 4) < 5 * 14)


def test_gates_begin_with_the_scale_of_their_inputs(unit):
    for gate in (unit.recurrence_gate, unit.input_gate):
        assert gate.kernel.shape == (4, 256, 256)
        assert np.std(gate.kernel[...]) == pytest.approx(0.9866 * (1 / 256) ** 0.5, rel=0.01)
        assert not np.any(gate.bias[...])


@pytest.mark.parametrize(
    "x, slope",
    [(1.0, 0.5), (0.25, 1.0), (1e-6, 500.0), (2.5e-7, 1000.0), (1e-12, 1000.0), (0.0, 1000.0)],
)
def test_the_slope_of_the_square_root_ends_at_1000(x, slope):
    value, got = jax.jit(jax.value_and_grad(bounded_sqrt))(np.float32(x))
    assert value == np.sqrt(np.float32(x))
    assert got == pytest.approx(slope, rel=1e-5)


def test_gradients_stay_finite_when_a_gate_is_closed():
    """A decay of exactly 1: 1 - a^2 = 0."""
    unit = jax.jit(lambda key: RGLRU(4, 2, rngs=nnx.Rngs(key)))(jax.random.key(0))
    unit.decay = nnx.Param(jnp.full(4, -200.0), axes=("mlp",))
    x = np.ones((1, 5, 4), np.float32)

    @jax.jit
    def gradient(unit):
        return jax.grad(lambda unit: jnp.sum(unit(x, jnp.ones((1, 4)))[0]))(unit)

    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient(unit)))


def test_the_state_is_float32_whatever_the_activations():
    block = jax.jit(
        lambda key: RecurrentBlock(8, 6, 2, init=truncated_normal(0.3), rngs=nnx.Rngs(key))
    )(jax.random.key(0))
    block = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), block)
    x = jax.ShapeDtypeStruct((2, 5, 8), jnp.bfloat16)
    y, state = jax.eval_shape(lambda block, x: block(x, block.init_state(2)), block, x)
    assert y.dtype == jnp.bfloat16
    assert (state.window.dtype, state.hidden.dtype) == (jnp.float32, jnp.float32)
    assert (state.window.shape, state.hidden.shape) == ((2, 3, 6), (2, 6))


def test_a_stream_that_begins_is_not_scaled(unit):
    """The first input after a reset enters with weight 1 instead of sqrt(1 - a^2)."""
    x = np.random.default_rng(0).normal(size=(1, 1, WIDTH)).astype(np.float32)
    y, _ = jax.jit(lambda unit, x: unit(x, unit.init_state(1), reset=jnp.ones((1, 1), bool)))(
        unit, x
    )
    params = nnx.to_pure_dict(nnx.split(unit)[1])["input_gate"]
    gate = references.sigmoid(references.block_linear(jax.device_get(params), x))
    np.testing.assert_allclose(y, gate * x, atol=1e-5)
