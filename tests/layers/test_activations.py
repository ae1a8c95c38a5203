"""Activations by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.layers.activations import ACTIVATIONS, activation, silu
from tests import references

X = np.linspace(-8, 8, 17).astype(np.float32)


def test_names_mean_what_they_say():
    for name, want in (
        ("silu", references.silu(X)),
        ("gelu_tanh", references.gelu(X)),
        ("relu", np.maximum(X, 0)),
        ("tanh", np.tanh(X)),
        ("sigmoid", references.sigmoid(X)),
        ("identity", X),
        ("leaky_relu", np.where(X > 0, X, 0.01 * X)),
        ("selu", 1.0507009873554805 * np.where(X > 0, X, 1.6732632423543772 * np.expm1(X))),
        ("elu", np.where(X > 0, X, np.expm1(X))),
        ("softplus", np.log1p(np.exp(X))),
        ("exp", np.exp(X)),
        ("half_sigmoid", references.sigmoid(X) / 2),
        ("relu2", np.maximum(X, 0) ** 2),
        ("relu6", np.clip(X, 0, 6)),
        ("mish", X * np.tanh(np.log1p(np.exp(X)))),
        ("quick_gelu", X * references.sigmoid(1.702 * X)),
        ("hard_swish", X * np.clip(X + 3, 0, 6) / 6),
    ):
        np.testing.assert_allclose(activation(name)(X), want, atol=1e-6, rtol=1e-6)
    # x Phi(x), with Phi(1) = 0.8413447; the tanh form differs by 1.5e-4.
    assert activation("gelu")(np.float32(1)) == pytest.approx(0.8413447, abs=1e-6)


def test_an_unknown_name_gets_the_known_ones():
    with pytest.raises(ValueError, match=r"no 'swilu'\. Did you mean silu\? Known: silu, gelu"):
        activation("swilu")
    assert all(callable(function) for function in ACTIVATIONS.values())


def test_silu_and_its_gradient_are_those_of_jax_however_large_the_input():
    x = jnp.array([-1e30, -200.0, -88.5, -20.0, -1.0, 0.0, 1.0, 20.0, 200.0, 1e30])
    np.testing.assert_allclose(silu(x), jax.nn.silu(x), rtol=1e-6, atol=1e-30)
    for order in range(2):
        ours, theirs = silu, jax.nn.silu
        for _ in range(order + 1):
            ours, theirs = jax.grad(ours), jax.grad(theirs)
        got, want = jax.vmap(ours)(x), jax.vmap(theirs)(x)
        assert np.all(np.isfinite(got))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_silu_of_short_numbers_is_rounded_once():
    x = jnp.linspace(-8, 8, 65).astype(jnp.bfloat16)
    want = references.silu(np.asarray(x, np.float64))
    got = silu(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, jnp.asarray(want, jnp.float32).astype(jnp.bfloat16))


def test_the_gradient_of_silu_of_short_numbers_is_rounded_once():
    x = jnp.linspace(-8, 8, 65).astype(jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    s = references.sigmoid(wide)
    want = jnp.asarray(s * (1 + wide * (1 - s)), jnp.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(jax.vmap(jax.grad(silu))(x), want)
