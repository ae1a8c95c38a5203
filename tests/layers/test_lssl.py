"""LSSL where the laws do not look: the convolutional view, what is trained, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.lssl import LSSLConfig
from jaxrec.testing import assert_close
from tests import references


def build(**options):
    config = LSSLConfig(width=3, state=4, outputs=2, **options)
    return jax.jit(lambda key: config.build(rngs=nnx.Rngs(key)))(jax.random.key(0))


def signal(time=9):
    return np.random.default_rng(0).normal(size=(2, time, 3)).astype(np.float32)


run = jax.jit(lambda layer, x, **kwargs: layer(x, **kwargs), static_argnames="method")


@pytest.mark.parametrize("transition", [False, True])
@pytest.mark.parametrize("step", [False, True])
def test_only_what_is_trained_receives_a_gradient(transition, step):
    layer = build(train_transition=transition, train_step=step)
    gradient = jax.jit(jax.grad(lambda layer: jnp.sum(layer(signal())[0])))(layer)
    assert np.any(gradient.log_step[...]) == step
    assert (gradient.transition is not None) == transition
    if transition:
        assert np.any(gradient.transition[...]) and np.any(gradient.input[...])


@pytest.mark.parametrize("method", ["scan", "conv"])
@pytest.mark.parametrize("state", [8, 16])
def test_hippo_by_euler_s_rule_is_right_although_it_grows_at_first(state, method):
    """Powers of 1 + dt A, whose eigenvectors are almost parallel, reach 1e5 before they decay.
    Measured: at most 2e-6 of the largest value.
    """
    config = LSSLConfig(width=3, state=state, outputs=2, alpha=0.0, train_transition=True)
    layer = jax.jit(lambda key: config.build(rngs=nnx.Rngs(key)))(jax.random.key(0))
    layer.log_step[...] = jnp.log(jnp.array([0.1, 0.03, 0.001], jnp.float32))
    x = signal(64)
    params = jax.device_get(nnx.to_pure_dict(nnx.split(layer)[1]))
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    begin, never = np.zeros((2, 3, state)), np.zeros((2, 64), bool)
    want = references.lssl(wide, x.astype(np.float64), begin, never, 0.0)
    for got, expected in zip(run(layer, x, method=method), want, strict=True):
        assert_close(got, expected, rtol=1e-5)


def test_bad_input_is_refused():
    layer, x = build(), signal()
    with pytest.raises(ValueError, match=r"outputs must be >= 1, got 0"):
        LSSLConfig(width=3, state=4, outputs=0)
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 1\.5"):
        LSSLConfig(width=3, state=4, alpha=1.5)
    with pytest.raises(ValueError, match=r"0 < dt_min <= dt_max, got -1\.0 and 0\.1"):
        LSSLConfig(width=3, state=4, dt_min=-1.0)
    with pytest.raises(ValueError, match=r"step_rescale must be > 0, got -2"):
        layer(x, step_rescale=-2)
    with pytest.raises(ValueError, match=r"one number, got shape \(2, 9\)\. .* are for S5"):
        layer(x, step_rescale=np.ones((2, 9), np.float32))
    with pytest.raises(ValueError, match=r"needs a state of shape \(2, 3, 4\), got \(1, 3, 4\)"):
        layer(x, layer.init_state(1))
    with pytest.raises(ValueError, match=r"method 'conv' begins at zero and knows no resets"):
        layer(x, layer.init_state(2), method="conv")
