"""Normalisation against its formula in float64, and in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.norm import LayerNorm, RMSNorm
from tests import references

RNG = np.random.default_rng(0)
SCALE, BIAS = RNG.normal(size=(2, 6)).astype(np.float32)
X = (3 * RNG.normal(size=(2, 5, 6)) + 1).astype(np.float32)


def rms(unit_offset=False):
    norm = RMSNorm(6, epsilon=1e-3, unit_offset=unit_offset)
    norm.scale = nnx.Param(jnp.asarray(SCALE), axes=(None,))
    return norm


def layer():
    norm = LayerNorm(6, epsilon=1e-3)
    norm.scale, norm.bias = (nnx.Param(jnp.asarray(v), axes=(None,)) for v in (SCALE, BIAS))
    return norm


apply = jax.jit(lambda norm, x: norm(x))


def without_bias():
    norm = LayerNorm(6, epsilon=1e-3, bias=False, groups=2)
    norm.scale = nnx.Param(jnp.asarray(SCALE), axes=(None,))
    return norm


def rms_with_bias():
    norm = RMSNorm(6, epsilon=1e-3, bias=True)
    norm.scale, norm.bias = (nnx.Param(jnp.asarray(v), axes=(None,)) for v in (SCALE, BIAS))
    return norm


PARAMS = {"scale": SCALE.astype(np.float64), "bias": BIAS.astype(np.float64)}
ONLY_SCALE = {"scale": PARAMS["scale"]}
both = pytest.mark.parametrize(
    "norm, reference",
    [
        (rms(), lambda _, *args: references.rms_norm(ONLY_SCALE, *args)),
        (
            rms(unit_offset=True),
            lambda _, *args: references.rms_norm(ONLY_SCALE, *args, unit_offset=True),
        ),
        (rms_with_bias(), references.rms_norm),
        (layer(), references.layer_norm),
        (without_bias(), lambda _, *args: references.layer_norm(ONLY_SCALE, *args, groups=2)),
    ],
    ids=["rms", "rms unit offset", "rms bias", "layer", "layer groups"],
)


@both
def test_equals_the_formula(norm, reference):
    want = reference(PARAMS, X.astype(np.float64), 1e-3)
    # Ten times the float32-float64 gap of numbers up to 4.
    np.testing.assert_allclose(apply(norm, X), want, atol=5e-6)


@both
def test_bfloat16_is_normalised_in_float32(norm, reference):
    """With 300 added, bfloat16 statistics would lose the deviations altogether."""
    x = (X + 300).astype(jnp.bfloat16)
    got = apply(norm, x)
    assert got.dtype == jnp.bfloat16
    want = reference(PARAMS, x.astype(np.float64), 1e-3)
    # Normed value, scale and bias are each rounded once: three halves of 2^-7 of their size.
    np.testing.assert_allclose(
        got.astype(np.float32), want, atol=1.5 * 2.0**-7 * np.max(np.abs(want))
    )


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 4, 6)])
def test_any_leading_axes(shape):
    x = np.resize(X, shape)
    assert apply(rms(), x).shape == apply(layer(), x).shape == shape


def test_begins_as_plain_normalisation():
    for norm in (RMSNorm(6), RMSNorm(6, unit_offset=True)):
        rows = np.asarray(apply(norm, X))
        np.testing.assert_allclose(np.mean(rows**2, axis=-1), 1, atol=1e-5)
    rows = np.asarray(apply(LayerNorm(6), X))
    np.testing.assert_allclose(np.mean(rows, axis=-1), 0, atol=1e-5)
    np.testing.assert_allclose(np.var(rows, axis=-1), 1, atol=1e-4)


def test_zeros_stay_finite():
    zeros = np.zeros((1, 6), np.float32)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(RMSNorm(6)(x))))(zeros)
    assert np.all(np.isfinite(slope))
    np.testing.assert_array_equal(apply(RMSNorm(6), zeros), zeros)


def test_groups_are_normalised_each_by_itself():
    norm = RMSNorm(6, epsilon=1e-3, groups=3)
    parts = [apply(RMSNorm(2, epsilon=1e-3), X[..., i : i + 2]) for i in (0, 2, 4)]
    np.testing.assert_allclose(apply(norm, X), np.concatenate(parts, axis=-1), rtol=1e-6)
    with pytest.raises(ValueError, match="width 6 does not divide into 4 groups"):
        RMSNorm(6, groups=4)


def test_groups_must_divide_the_width():
    with pytest.raises(ValueError, match="width 6 does not divide into 4 groups"):
        LayerNorm(6, groups=4)
