"""Patches of images as vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.patches import patches
from jaxrec.ops.resize import bicubic

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(2, 2, 3, 5)).astype(np.float32)
BIAS = RNG.normal(size=5).astype(np.float32)
POSITION = RNG.normal(size=(2, 3, 5)).astype(np.float32)


@pytest.mark.parametrize("grid", [(2, 3), (4, 2)])
def test_each_patch_is_mapped_by_itself_and_gets_its_position(grid):
    images = RNG.normal(size=(2, 2 * grid[0], 2 * grid[1], 3)).astype(np.float32)
    want = np.zeros((2, *grid, 5))
    for b, i, j in np.ndindex(2, *grid):
        pixels = images[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].astype(np.float64)
        want[b, i, j] = np.einsum("xyc,xycd->d", pixels, KERNEL) + BIAS
    np.testing.assert_allclose(patches(images, KERNEL, BIAS, None), want, atol=1e-5)
    got = patches(images, KERNEL, BIAS, jnp.asarray(POSITION))
    np.testing.assert_allclose(got, want + np.asarray(bicubic(POSITION, grid)), atol=1e-5)


def test_the_dtype_is_the_kernels():
    half = [jnp.asarray(x, jnp.bfloat16) for x in (KERNEL, BIAS)]
    images = jax.ShapeDtypeStruct((1, 4, 6, 3), jnp.float32)
    got = jax.eval_shape(lambda x: patches(x, *half, jnp.asarray(POSITION)), images)
    assert got.dtype == jnp.bfloat16 and got.shape == (1, 2, 3, 5)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 4, 5, 3), np.float32, "must be multiples of the patch's 2, got 4 x 5"),
        ((2, 0, 4, 3), np.float32, "must be multiples of the patch's 2, got 0 x 4"),
        ((2, 4, 4, 1), np.float32, r"images must be float \(b x y 3\), got float32 \(2, 4, 4, 1\)"),
        ((2, 4, 4, 3), np.uint8, r"images must be float \(b x y 3\), got uint8"),
        ((4, 4, 3), np.float32, r"images must be float \(b x y 3\)"),
    ],
)
def test_bad_images_are_refused(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        patches(jnp.zeros(shape, dtype), KERNEL, BIAS, None)
