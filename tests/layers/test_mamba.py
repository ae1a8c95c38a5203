"""The mixer's start and its state; its values are in the laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.mamba import Mamba, log_uniform_step_bias
from tests import references


def build(**options):
    return jax.jit(lambda key: Mamba(8, 6, 3, 2, rngs=nnx.Rngs(key), **options))(jax.random.key(0))


def test_rates_begin_at_one_to_n_and_the_skip_at_one():
    mixer = build()
    np.testing.assert_allclose(np.exp(mixer.log_rate[...]), [[1, 2, 3]] * 6, rtol=1e-6)
    np.testing.assert_array_equal(mixer.skip[...], np.ones(6))


@pytest.mark.parametrize("low, high, floor", [(1e-3, 1e-1, 1e-4), (1e-5, 1e-3, 1e-4)])
def test_step_sizes_begin_log_uniform_and_no_smaller_than_the_floor(low, high, floor):
    init = log_uniform_step_bias(low, high, floor)
    bias = np.asarray(jax.jit(init, static_argnums=1)(jax.random.key(0), (4096,)), np.float64)
    step = references.softplus(bias)
    assert np.min(step) >= max(low, floor) * (1 - 1e-4) and np.max(step) <= high * (1 + 1e-4)
    # Below a point between the ends lie as many as its logarithm says; the deviation is 0.008.
    middle = (max(low, floor) * high) ** 0.5
    share = np.log(middle / low) / np.log(high / low)
    assert np.mean(step < middle) == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize("bias, conv_bias", [(True, True), (False, False)])
def test_biases_are_there_when_asked_for(bias, conv_bias):
    params = nnx.to_pure_dict(nnx.split(build(bias=bias, conv_bias=conv_bias))[1])
    assert ("bias" in params["input"]) == ("bias" in params["out"]) == bias
    assert ("conv_bias" in params) == conv_bias
    assert "bias" in params["step"]


def test_the_state_is_float32_whatever_the_activations():
    mixer = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), build())
    x = jax.ShapeDtypeStruct((2, 5, 8), jnp.bfloat16)
    y, state = jax.eval_shape(lambda mixer, x: mixer(x, mixer.init_state(2)), mixer, x)
    assert y.dtype == jnp.bfloat16
    assert (state.window.dtype, state.hidden.dtype) == (jnp.float32, jnp.float32)
    assert (state.window.shape, state.hidden.shape) == ((2, 3, 6), (2, 6, 3))


def test_a_state_of_another_batch_size_is_named():
    mixer, x = build(), jnp.ones((2, 5, 8))
    state = mixer.init_state(2)._replace(hidden=jnp.zeros((3, 6, 3)))
    with pytest.raises(ValueError, match=r"state must be \(b e n\) = \(2, 6, 3\), got \(3, 6, 3\)"):
        mixer(x, state)
