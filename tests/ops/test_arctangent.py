"""The angle of Adam-atan2 against NumPy in float64."""

import jax.numpy as jnp
import numpy as np

from jaxrec.ops.arctangent import angle


def test_it_is_the_angle_of_numpy_over_all_magnitudes():
    rng = np.random.default_rng(0)
    y, x = np.float32(10.0 ** rng.uniform(-30, 30, size=(2, 100_000)))
    # Quotients near 1 and far from it, of both signs.
    y = np.concatenate([y, x * np.linspace(0, 3, len(x), dtype=np.float32)])
    x = np.concatenate([x, x])
    y[::2] *= -1
    want = np.arctan2(y.astype(np.float64), x.astype(np.float64))
    seen = np.abs(want) > np.finfo(np.float32).tiny  # smaller ones are flushed to zero
    got = np.asarray(angle(jnp.asarray(y), jnp.asarray(x)))
    np.testing.assert_allclose(got[seen], want[seen], rtol=4e-7, atol=0)
    assert np.all(np.abs(got[~seen]) <= np.finfo(np.float32).tiny)


def test_the_ends():
    inf, nan = np.inf, np.nan
    y = jnp.array([0.0, 0.0, 1.0, -1.0, inf, -inf, 1.0, nan, 1.0, inf])
    x = jnp.array([0.0, 1.0, 0.0, 0.0, 1.0, 1.0, inf, 1.0, nan, inf])
    half = np.float32(np.pi / 2)
    want = [0.0, 0.0, half, -half, half, -half, 0.0, nan, nan, half / 2]
    np.testing.assert_allclose(angle(y, x), np.float32(want), rtol=2e-7)
