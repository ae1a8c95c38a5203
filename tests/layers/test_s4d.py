"""S4D where the laws do not look: the convolutional view, its last state, how it begins, bad
input.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.s4d import S4DConfig


def build(**options):
    config = S4DConfig(width=3, state=6, **options)
    return jax.jit(lambda key: config.build(rngs=nnx.Rngs(key)))(jax.random.key(0))


def signal(time=9):
    return np.random.default_rng(0).normal(size=(2, time, 3)).astype(np.float32)


run = jax.jit(lambda layer, x, **kwargs: layer(x, **kwargs), static_argnames="method")


@pytest.mark.parametrize("method", ["conv", "scan"])
def test_activations_keep_their_dtype_and_the_state_its_own(method):
    y, state = jax.eval_shape(
        lambda layer, x: layer(x, method=method), build(), signal().astype(jnp.bfloat16)
    )
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.complex64)


def test_bad_input_is_refused():
    layer, x = build(), signal()
    with pytest.raises(ValueError, match=r"needs conjugate pairs, so state must be even .* got 5"):
        S4DConfig(width=3, state=5)
    with pytest.raises(ValueError, match=r"init must be one of lin, inv, legs, got 'x'"):
        S4DConfig(width=3, state=6, init="x")
    with pytest.raises(ValueError, match=r"0 < dt_min <= dt_max, got 0\.1 and 0\.01"):
        S4DConfig(width=3, dt_min=0.1, dt_max=0.01)
    with pytest.raises(ValueError, match=r"step_rescale must be > 0, got 0"):
        layer(x, step_rescale=0)
    with pytest.raises(ValueError, match=r"one number, got shape \(2, 9\)\. .* are for S5"):
        layer(x, step_rescale=np.ones((2, 9), np.float32))
    with pytest.raises(ValueError, match=r"needs a state of shape \(2, 3, 3\), got \(4, 3, 3\)"):
        layer(x, layer.init_state(4))
    for options in ({"state": layer.init_state(2)}, {"reset": np.zeros((2, 9), bool)}):
        with pytest.raises(ValueError, match=r"method 'conv' begins at zero and knows no resets"):
            layer(x, method="conv", **options)
    with pytest.raises(ValueError, match=r"method must be one of .*, got 'fft'"):
        layer(x, method="fft")
