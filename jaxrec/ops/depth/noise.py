"""Noise on the latent state of a loop while a model is used, to test what depth makes of it.

    s <- (1 - w) s + w g,   g ~ N(0, 1),   w by the loop i: n | n/(i+1) | n/sqrt(i+1) |
                                               max(n, (m-i)/m) | 2 u n with u ~ U(0, 1)

with n = level times the deviation of the initial latent state and m the trained mean depth.

Geiping et al. (2025), arXiv:2502.05171; an option of its published code.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

NoiseKind = Literal["fixed", "geom", "sqrt", "line", "chi"]


@dataclasses.dataclass(frozen=True)
class LatentNoise:
    """How much of the latent state becomes noise before each loop."""

    level: float  # in deviations of the initial latent state; > 0
    kind: NoiseKind = "fixed"

    def __post_init__(self) -> None:
        if not 0 < self.level < float("inf"):
            raise ValueError(f"Noise level must be > 0 and finite, got {self.level}.")
        if self.kind not in get_args(NoiseKind):
            raise ValueError(f"Noise must be one of {get_args(NoiseKind)}, got {self.kind!r}.")

    def mix(self, latent: Array, loop: Array, key: Array, deviation: float, mean: int) -> Array:
        """One latent state (d) before loop i, int32 () from 0."""
        uniform_key, normal_key = jax.random.split(key)
        n = self.level * deviation
        done = loop.astype(jnp.float32)
        match self.kind:
            case "geom":
                weight = n / (done + 1)
            case "sqrt":
                weight = n / jnp.sqrt(done + 1)
            case "line":
                weight = jnp.maximum(n, (mean - done) / mean)
            case "chi":
                weight = 2 * n * jax.random.uniform(uniform_key)
            case _:
                weight = jnp.asarray(n, jnp.float32)
        return (1 - weight) * latent + weight * jax.random.normal(normal_key, latent.shape)
