"""The weight of the noise in each schedule, measured from its effect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.depth.noise import LatentNoise

LEVEL, DEVIATION, MEAN = 0.5, 0.6, 8
N = LEVEL * DEVIATION


@pytest.mark.parametrize(
    ("kind", "weight"),
    [
        ("fixed", lambda i: N),
        ("geom", lambda i: N / (i + 1)),
        ("sqrt", lambda i: N / (i + 1) ** 0.5),
        ("line", lambda i: max(N, (MEAN - i) / MEAN)),
    ],
)
def test_the_state_keeps_what_the_noise_does_not_take(kind, weight):
    key, size = jax.random.key(0), 40_000
    for loop in (0, 1, 6):
        mixed = LatentNoise(LEVEL, kind).mix(
            jnp.full(size, 5.0), jnp.asarray(loop, jnp.int32), key, DEVIATION, MEAN
        )
        w = weight(loop)
        assert np.mean(mixed) == pytest.approx(5 * (1 - w), abs=4 * w / size**0.5 + 1e-6)
        assert np.std(mixed) == pytest.approx(w, rel=0.02)


def test_chi_draws_the_weight_too():
    noise, at = LatentNoise(LEVEL, "chi"), jnp.asarray(0, jnp.int32)
    keys = jax.random.split(jax.random.key(1), 200)
    states = jax.vmap(lambda key: noise.mix(jnp.full(500, 5.0), at, key, DEVIATION, MEAN))(keys)
    weights = np.std(states, axis=1)
    assert 0 <= weights.min() < 0.1 * N and 1.9 * N < weights.max() < 2.2 * N
