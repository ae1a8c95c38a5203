"""Bicubic interpolation of grids."""

import numpy as np
import pytest

from jaxrec.ops.resize import bicubic


def test_the_same_size_changes_nothing():
    grid = np.random.default_rng(0).normal(size=(4, 3, 2)).astype(np.float32)
    np.testing.assert_allclose(bicubic(grid, (4, 3)), grid, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 3), (5, 9), (2, 2)])
def test_a_constant_stays_constant(shape):
    grid = np.full((4, 3, 2), 1.5, np.float32)
    np.testing.assert_allclose(bicubic(grid, shape), np.full((*shape, 2), 1.5), atol=1e-6)


def test_twice_the_size_as_pytorch_gives_it():
    """interpolate(arange(4), 8, bicubic) of PyTorch 2.13, align_corners off."""
    grid = np.arange(4, dtype=np.float32)[:, None, None]
    want = [-0.1054688, 0.1914062, 0.6679688, 1.296875, 1.703125, 2.332031, 2.808594, 3.105469]
    np.testing.assert_allclose(bicubic(grid, (8, 1))[:, 0, 0], want, atol=1e-6)
