"""Activations by name."""

import numpy as np
import pytest

from jaxrec.layers.activations import ACTIVATIONS, activation
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
