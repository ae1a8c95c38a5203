"""Sinusoids against the formula, for even and odd widths."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.sinusoid import sinusoid
from tests import references


@pytest.mark.parametrize("width", [2, 3, 8, 9])
def test_equals_the_formula(width):
    position = np.array([[0, 1, 2], [7, 100, 999]], np.int32)
    want = [[references.sinusoid(p, width, np.dtype(np.float64)) for p in row] for row in position]
    got = sinusoid(jnp.asarray(position), width)
    assert (got.shape, got.dtype) == ((2, 3, width), jnp.float32)
    np.testing.assert_allclose(got, want, atol=1e-4)  # of a float32 angle of 999
    np.testing.assert_allclose(got[0], want[0], atol=1e-6)


def test_the_halves_are_sines_and_cosines_from_short_to_long_waves():
    got = sinusoid(jnp.asarray(3, jnp.int32), 6)
    frequencies = np.array([1, 1e-2, 1e-4])
    want = np.concatenate([np.sin(3 * frequencies), np.cos(3 * frequencies)])
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_no_wave_fits_into_one_channel():
    with pytest.raises(ValueError, match="sinusoid: width must be >= 2, got 1"):
        sinusoid(jnp.zeros(3), 1)
