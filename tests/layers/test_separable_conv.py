"""Separable convolutions against a loop, causal and centred, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.separable_conv import SeparableConv
from tests import references

X = np.random.default_rng(0).normal(size=(2, 9, 4)).astype(np.float32)


def layer(causal):
    init = jax.nn.initializers.normal(0.5)
    return SeparableConv(4, 6, causal=causal, init=init, rngs=nnx.Rngs(0))


def params(layer):
    pure = nnx.to_pure_dict(nnx.split(layer)[1])
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), pure)


def test_causal_equals_the_loop_wherever_it_is_cut():
    conv, reset = layer(True), np.zeros((2, 9), bool)
    reset[1, 3] = True
    want = references.separable_conv(params(conv), X.astype(np.float64), reset)
    whole, last = conv(X, reset=reset)
    left, state = conv(X[:, :4], reset=reset[:, :4])
    right, state = conv(X[:, 4:], state, reset=reset[:, 4:])
    np.testing.assert_allclose(whole, want, atol=5e-6)
    np.testing.assert_allclose(np.concatenate([left, right], axis=1), want, atol=5e-6)
    for one, two in zip(state, last, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


def test_centred_equals_the_loop_and_padding_is_zero():
    conv = layer(False)
    p = params(conv)
    is_token = np.arange(9)[None] < np.array([[9], [6]])
    y, _ = conv(X, is_token=is_token)
    for row, length in enumerate((9, 6)):
        x = X[row, :length].astype(np.float64)
        for kernel, after in ("first_kernel", "up"), ("second_kernel", "out"):
            half = len(p[kernel]) // 2
            wide = np.pad(x, [(half, half), (0, 0)])
            x = np.array([np.sum(p[kernel] * wide[t : t + 2 * half + 1], 0) for t in range(length)])
            x = references.linear(p[after], x)
            x = np.maximum(x, 0) if after == "up" else x
        np.testing.assert_allclose(y[row, :length], x, atol=5e-6)


def test_the_kernels_keep_the_variance():
    conv = SeparableConv(400, 400, init=jax.nn.initializers.normal(), rngs=nnx.Rngs(0))
    assert np.std(conv.first_kernel[...]) == pytest.approx(3**-0.5, rel=0.05)
    assert np.std(conv.second_kernel[...]) == pytest.approx(5**-0.5, rel=0.05)


def test_centred_has_no_state():
    conv = layer(False)
    with pytest.raises(ValueError, match="without causality there are no states and no resets"):
        conv(X, conv.init_state(2))
    with pytest.raises(ValueError, match="no states and no resets"):
        conv(X, reset=jnp.zeros((2, 9), jnp.bool_))
