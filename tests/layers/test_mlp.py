"""MLPs against their formulas."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.linear import truncated_normal
from jaxrec.layers.mlp import MLP, GatedMLP
from tests import references


def build(**options):
    init = truncated_normal(0.5)
    make = functools.partial(GatedMLP, 4, 6, init=init, **options)
    return jax.jit(lambda key: make(rngs=nnx.Rngs(key)))(jax.random.key(0))


@pytest.mark.parametrize(
    "activation, reference", [(jax.nn.silu, references.silu), (jax.nn.gelu, references.gelu)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_formula(activation, reference, bias):
    mlp = jax.tree.map(lambda leaf: leaf + 0.1, build(activation=activation, bias=bias))
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    state = nnx.to_pure_dict(nnx.split(mlp)[1])
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state)
    assert ("bias" in params["up"]) == bias
    want = references.gated_mlp(params, x.astype(np.float64), reference)
    # Ten times the float32-float64 gap of numbers around 1.
    np.testing.assert_allclose(jax.jit(lambda mlp, x: mlp(x))(mlp, x), want, atol=3e-6)


def test_parts_may_begin_differently():
    small = truncated_normal(1e-3)
    mlp = build(up_init=small, out_init=small)
    gate, up, out = (np.std(layer.kernel[...]) for layer in (mlp.gate, mlp.up, mlp.out))
    assert gate > 0.2 and up < 2e-3 and out < 2e-3


def test_the_inner_width_is_split_over_the_model_axis():
    mlp = build()
    assert mlp.gate.kernel.get_metadata("axes") == ("embed", "mlp")
    assert mlp.out.kernel.get_metadata("axes") == ("mlp", "embed")


def test_the_plain_one_equals_its_formula():
    make = functools.partial(MLP, 4, 6, init=truncated_normal(0.5), activation=jax.nn.silu)
    mlp = jax.jit(lambda key: make(rngs=nnx.Rngs(key)))(jax.random.key(0))
    mlp = jax.tree.map(lambda leaf: leaf + 0.1, mlp)
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    state = nnx.to_pure_dict(nnx.split(mlp)[1])
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state)
    up, out = wide["up"], wide["out"]
    inner = references.silu(x.astype(np.float64) @ up["kernel"] + up["bias"])
    want = inner @ out["kernel"] + out["bias"]
    np.testing.assert_allclose(jax.jit(lambda mlp, x: mlp(x))(mlp, x), want, atol=3e-6)
