"""Rules of freezing and mixers on windows small enough to be looked at."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.generation.diffusion_forcing import rules
from jaxrec.generation.diffusion_forcing.rules import Stretch


def stretch(values, start):
    """Rows (n 1) from a position on, all of which count."""
    rows = jnp.array(values, jnp.float32)[:, None]
    return Stretch(rows, jnp.int32(start), jnp.int32(len(values)))


def test_a_stretch_is_read_from_any_later_position():
    rows, count = stretch([5.0, 6.0, 7.0], 10).at(jnp.int32(12), 4)
    assert rows[0, 0] == 7 and count == 1
    assert stretch([5.0], 10).at(jnp.int32(20), 2)[1] == 0


def test_positions_before_the_last_settled_one_are_frozen_with_it():
    """Position 21 moves, 22 does not: 23 tokens are frozen; 23 is new and has no change yet."""
    latent = jnp.array([[1.0], [2.0], [4.0], [4.0]])
    before = stretch([9.0, 1.0, 1.0, 4.0], 19)
    assert rules.by_change(latent, before, jnp.int32(20), 0.1) == 23
    assert rules.by_change(latent, stretch([9.0, 2.0, 4.0, 8.0], 19), jnp.int32(20), 0.1) == 0


def test_an_acceleration_is_aligned_by_place_or_by_position():
    """S grows by one a step at every position; between the steps the window moved on by one."""
    latent, before = jnp.array([[13.0], [24.0]]), stretch([1.0, 12.0, 23.0], 4)
    start, size = jnp.int32(5), jnp.int32(2)
    twice = stretch([0.0, 11.0, 20.0], 4)
    assert rules.by_acceleration(latent, before, twice, start, size, 0.05) == 6
    settled, delta = rules.by_acceleration_in_place(
        latent, before, stretch([9.0, 1.0], 4), start, 0.05
    )
    assert settled == 7 and delta.start == 5 and delta.size == 2
    np.testing.assert_array_equal(delta.rows, [[1.0], [1.0]])


def test_stability_and_schedule_wait():
    assert rules.by_stability(jnp.array([9, 0, 3, 2]), 2) == 3
    assert rules.by_stability(jnp.array([2, 0, 1, 2]), 2) == 0
    for steps, tokens in ((2, 0), (3, 12)):
        assert rules.by_schedule(jnp.int32(steps), 2, jnp.int32(10), jnp.int32(2)) == tokens


@pytest.mark.parametrize(("by_roots", "value"), [(False, 0.75 * 2 + 0.25 * 8), (True, None)])
def test_noise_takes_its_part(by_roots, value):
    value = value or 0.75**0.5 * 2 + 0.25**0.5 * 8
    mixed = rules.mix_noise(
        jnp.array([[2.0], [2.0]]),
        jnp.array([[8.0], [8.0]]),
        jnp.array([0.25, 0.0]),
        by_roots=by_roots,
    )
    np.testing.assert_allclose(mixed, [[value], [2.0]], rtol=1e-6)


def test_new_positions_have_their_own_part_of_the_average_only():
    mixed = rules.mix_embeddings(
        jnp.array([[10.0], [10.0], [10.0]]), stretch([1.0, 5.0, 7.0], 2), jnp.int32(3), 0.2
    )
    np.testing.assert_allclose(mixed, [[9.0], [9.4], [8.0]], rtol=1e-6)
