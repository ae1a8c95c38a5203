"""When positions of the window are settled, and what is mixed into it: one row, pure functions.

A rule answers how many tokens, counted from the first of all, are frozen: int32 (), 0 for none. All
rules freeze up to the last settled position, even where one before it has not settled.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrec.ops.depth.exits import relative_change


class Stretch(NamedTuple):
    """Some rows of numbers (n d), of which the first `size` count, from a position on."""

    rows: Array
    start: Array  # int32 ()
    size: Array  # int32 ()

    def at(self, start: Array, count: int) -> tuple[Array, Array]:
        """The rows from another position on, (count d), and how many of them there are."""
        index = jnp.arange(count, dtype=jnp.int32) + (start - self.start)
        rows = jnp.take(self.rows, index, axis=0, mode="clip")
        return rows, jnp.maximum(self.size - (start - self.start), 0)


def by_schedule(steps: Array, delay: int, start: Array, count: Array) -> Array:
    """Rule "fixed": the first `count` positions, in every step after the first `delay`.

    Where a full window grows by less than the headway, the original freezes as many tokens as it
    grew by, none at worst, while its cache moves on by the headway, so that states and positions
    part. Here both move by `count`, the headway or what the window holds.
    """
    return jnp.where(steps > delay, start + count, 0)


def by_stability(stable: Array, delay: int) -> Array:
    """Rule "token-stability": tokens that stayed as they were in more than `delay` steps.

    stable: int32 (t), so many steps for every position of the text.
    """
    index = jnp.arange(stable.shape[0], dtype=jnp.int32)
    return jnp.max(jnp.where(stable > delay, index + 1, 0))


def by_change(latent: Array, before: Stretch, start: Array, threshold: float) -> Array:
    """Rule "latent-diff": |S - S_before| / |S| below the threshold; S is (n d) from `start` on."""
    rows, count = before.at(start, latent.shape[0])
    return _last(relative_change(latent, rows), count, start, threshold)


def by_acceleration_in_place(
    latent: Array, before: Stretch, delta: Stretch, start: Array, threshold: float
) -> tuple[Array, Stretch]:
    """Rule "latent-acceleration-1": |D - D_before| / |S| below the threshold, D = S - S_before.

    The two D are aligned by their place in the window, not by position, as the original does. Also
    returns D, the next step's `delta`.
    """
    rows, count = before.at(start, latent.shape[0])
    now = Stretch(latent - rows, start, count)
    count = jnp.minimum(count, delta.size)
    settled = _last(_ratio(now.rows - delta.rows, latent), count, start, threshold)
    return settled, now


def by_acceleration(
    latent: Array,
    before: Stretch,
    twice_before: Stretch,
    start: Array,
    size: Array,
    threshold: float,
) -> Array:
    """Rule "latent-acceleration-2": as the first, aligned by position; S has `size` rows."""
    rows, count = before.at(start, latent.shape[0])
    twice, twice_count = twice_before.at(start, latent.shape[0])
    measure = _ratio(latent - rows - (rows - twice), latent, 1e-6)
    return _last(measure, jnp.minimum(jnp.minimum(count, twice_count), size), start, threshold)


def mix_noise(latent: Array, noise: Array, part: Array, *, by_roots: bool) -> Array:
    """(1 - b) S + b z, or sqrt(1 - b) S + sqrt(b) z by roots; S, z are (n d), b is (n)."""
    part = part[:, None]
    if by_roots:
        return jnp.sqrt(jax.nn.relu(1 - part)) * latent + jnp.sqrt(part) * noise
    return (1 - part) * latent + part * noise


def mix_embeddings(embedded: Array, before: Stretch, start: Array, ema: float) -> Array:
    """(1 - m) E + m E_before; a new position has its own part only. E is (n d) from `start` on."""
    rows, count = before.at(start, embedded.shape[0])
    is_old = jnp.arange(embedded.shape[0])[:, None] < count
    return (1 - ema) * embedded + jnp.where(is_old, ema * rows, jnp.zeros_like(rows))


def _last(measure: Array, count: Array, start: Array, threshold: float) -> Array:
    """Tokens up to the last of `count` positions whose measure (n) is below the threshold."""
    place = jnp.arange(measure.shape[0], dtype=jnp.int32)
    is_settled = (place < count) & (measure < threshold)
    return jnp.max(jnp.where(is_settled, start + place + 1, 0))


def _ratio(x: Array, y: Array, epsilon: float = 0.0) -> Array:
    return jnp.linalg.norm(x, axis=-1) / (jnp.linalg.norm(y, axis=-1) + epsilon)
