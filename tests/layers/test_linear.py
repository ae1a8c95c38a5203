"""Affine maps: shapes, names of axes, dtypes, and how weights begin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.linear import BlockLinear, Linear, by_block, truncated_normal
from jaxrec.training.sharding import build_mesh
from tests import references

INIT = truncated_normal(0.5)
apply = jax.jit(lambda layer, x: layer(x))


def linear(outputs, *, bias=True, axes=None):
    axes = axes or ("embed", *([None] * (1 if isinstance(outputs, int) else len(outputs))))
    make = jax.jit(
        lambda key: Linear(4, outputs, init=INIT, axes=axes, bias=bias, rngs=nnx.Rngs(key))
    )
    return make(jax.random.key(0))


def numbers(module):
    """The parameters in float64 under their names."""
    state = nnx.to_pure_dict(nnx.split(module)[1])
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state)


@pytest.mark.parametrize("outputs", [3, (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("leading", [(), (5,), (2, 5)])
def test_maps_the_last_axis_to_one_or_several(outputs, leading):
    layer = linear(outputs)
    layer.bias = nnx.Param(jnp.ones(layer.bias.shape) * 0.25, axes=layer.bias.get_metadata("axes"))
    x = np.random.default_rng(0).normal(size=(*leading, 4)).astype(np.float32)
    got = apply(layer, x)
    shape = (outputs,) if isinstance(outputs, int) else outputs
    assert got.shape == (*leading, *shape)
    # Ten times the float32-float64 gap of sums of four products.
    np.testing.assert_allclose(got, references.linear(numbers(layer), x), atol=2e-6)


def test_the_dtype_is_that_of_the_weights():
    layer = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), linear(3))
    assert apply(layer, np.ones((2, 4), np.float32)).dtype == jnp.bfloat16
    assert apply(linear(3), np.ones((2, 4), jnp.bfloat16)).dtype == jnp.float32


def test_parameters_name_their_axes():
    layer = linear((2, 3), axes=("embed", "heads", None))
    assert layer.kernel.get_metadata("axes") == ("embed", "heads", None)
    assert layer.bias.get_metadata("axes") == ("heads", None)
    assert linear(3, bias=False).bias is None


def test_blocks_are_mapped_by_themselves():
    layer = jax.jit(lambda key: BlockLinear(6, 3, init=INIT, rngs=nnx.Rngs(key)))(jax.random.key(0))
    layer.bias = nnx.Param(jnp.arange(6.0).reshape(3, 2), axes=("heads", None))
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    y = apply(layer, x)
    # Ten times the float32-float64 gap of numbers up to 6.
    np.testing.assert_allclose(y, references.block_linear(numbers(layer), x), atol=5e-6)
    other = x.copy()
    other[..., 2:4] += 1e6
    np.testing.assert_array_equal(
        np.delete(y, [2, 3], -1), np.delete(apply(layer, other), [2, 3], -1)
    )


def test_blocks_must_divide_the_width():
    with pytest.raises(ValueError, match="BlockLinear: width 6 does not divide into 4 blocks"):
        BlockLinear(6, 4, init=INIT, rngs=nnx.Rngs(0))


def test_truncated_normal_is_cut_at_three_deviations():
    x = np.asarray(jax.jit(lambda key: truncated_normal(0.5)(key, (200_000,)))(jax.random.key(0)))
    assert 1.4 < np.max(np.abs(x)) <= 1.5
    # The cut takes 1.3 % off the deviation; 200,000 draws know it to 0.2 %.
    assert np.std(x) == pytest.approx(0.5 * 0.9866, rel=0.006)
    assert np.mean(x) == pytest.approx(0, abs=0.005)


@pytest.mark.parametrize("leading", [(), (5,), (4, 6)])
def test_products_by_block_also_where_time_is_split(leading):
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=shape) for shape in ((*leading, 3, 4), (3, 4, 2)))
    want = np.einsum("...hi,hij->...hj", x, kernel)
    x, kernel = (jnp.asarray(z, jnp.float32) for z in (x, kernel))
    np.testing.assert_allclose(by_block(x, kernel), want, atol=2e-6)
    with jax.set_mesh(build_mesh("seq=2")):
        np.testing.assert_allclose(jax.jit(by_block)(x, kernel), want, atol=2e-6)


def test_products_by_block_may_be_wider_than_what_they_are_made_of():
    x, kernel = jnp.ones((2, 1, 257), jnp.bfloat16), jnp.ones((1, 257, 1), jnp.bfloat16)
    assert by_block(x, kernel).dtype == jnp.bfloat16
    got = by_block(x, kernel, jnp.float32)
    np.testing.assert_array_equal(got, np.full((2, 1, 1), 257, np.float32))
