"""Names of activations in published configurations."""

import math

import numpy as np
import pytest

from jaxrec.convert import activations
from jaxrec.errors import UserError
from jaxrec.layers.activations import activation

X = np.linspace(-8, 8, 33)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


GELU = np.array([x * 0.5 * (1 + math.erf(x / 2**0.5)) for x in X])
GELU_TANH = 0.5 * X * (1 + np.tanh((2 / np.pi) ** 0.5 * (X + 0.044715 * X**3)))
THEIRS = {  # as the library of the Hugging Face layout defines them, in float64
    "silu": X * sigmoid(X),
    "swish": X * sigmoid(X),
    "gelu": GELU,
    "gelu_python": GELU,
    "gelu_pytorch_tanh": GELU_TANH,
    "gelu_new": GELU_TANH,
    "gelu_fast": GELU_TANH,
    "gelu_python_tanh": GELU_TANH,
    "gelu_accurate": GELU_TANH,
    "relu": np.maximum(X, 0),
    "tanh": np.tanh(X),
    "sigmoid": sigmoid(X),
    "linear": X,
    "leaky_relu": np.where(X > 0, X, 0.01 * X),
    "relu2": np.maximum(X, 0) ** 2,
    "relu6": np.clip(X, 0, 6),
    "mish": X * np.tanh(np.log1p(np.exp(X))),
    "quick_gelu": X * sigmoid(1.702 * X),
    "hardswish": X * np.clip(X + 3, 0, 6) / 6,
}


def test_every_name_means_their_function():
    assert THEIRS.keys() == activations.NAMES.keys()
    for name, want in THEIRS.items():
        ours = activations.read("mamba", "hidden_act", name)
        got = activation(ours)(X.astype(np.float32))
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6, err_msg=name)
        assert activations.read("mamba", "hidden_act", activations.write(ours)) == ours


def test_what_they_have_no_name_for_is_refused():
    with pytest.raises(UserError, match=r"no name for the activation 'selu'. It has those of silu"):
        activations.write("selu")
