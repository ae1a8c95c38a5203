"""What samplers share in which every row of a batch has a length of its own: its keys, its end, and
what of its text is new.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrec.errors import UserError
from jaxrec.generation.prompts import row_keys
from jaxrec.generation.sampling import SamplingConfig


class RowKeys(NamedTuple):
    """PRNG keys, (b) outside and () for one row; None where nothing is drawn."""

    draws: Array | None  # of tokens
    latents: Array | None  # of initial latent states
    guesses: Array  # of tokens that are filled in at random

    @classmethod
    def of(
        cls, rows: int, config: SamplingConfig, key: Array | None, latent_key: Array | None
    ) -> "RowKeys":
        """Keys of so many rows.

        Raises:
          UserError: tokens are drawn, and there is no key.
        """
        if key is None and not config.is_greedy:
            raise UserError("generate: drawing tokens needs a key. Pass key=jax.random.key(seed).")
        return cls(
            draws=None if config.is_greedy else row_keys(key, rows),
            latents=None if latent_key is None else row_keys(latent_key, rows),
            guesses=row_keys(jax.random.key(0) if key is None else key, rows),
        )


class End(NamedTuple):
    """What ends a row."""

    stop_tokens: Array  # int32 (n)
    max_new_tokens: Array  # int32 ()

    @classmethod
    def of(cls, stop_tokens: Sequence[int], max_new_tokens: int) -> "End":
        """As arrays: other values compile nothing."""
        return cls(
            jnp.asarray(list(stop_tokens), jnp.int32), jnp.asarray(max_new_tokens, jnp.int32)
        )

    def is_reached(self, tokens: Array, begin: Array, length: Array, prompt: Array) -> Array:
        """Whether the tokens (t) from `begin` to `length` end their row, bool ()."""
        index = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        is_new = (index >= begin) & (index < length)
        is_stop = jnp.any(tokens[:, None] == self.stop_tokens[None], axis=1)
        return jnp.any(is_stop & is_new) | (length - prompt >= self.max_new_tokens)


class Texts:
    """What of each row was shown already, on the host."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_tokens: Sequence[int]
    ) -> None:
        self.prompts = prompts
        self.lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        self._shown = self.lengths.copy()
        self._limit = self.lengths + max_new_tokens
        self._stops = np.array(list(stop_tokens), np.int32)

    def padded(self, capacity: int) -> Array:
        """The prompts, int32 (b capacity), zeros behind them."""
        tokens = np.zeros((len(self.prompts), capacity), np.int32)
        for row, prompt in enumerate(self.prompts):
            tokens[row, : len(prompt)] = prompt
        return jnp.asarray(tokens)

    def new(self, tokens: np.ndarray, known: np.ndarray) -> list[list[int]]:
        """What each row has now that it had not before, without its stop token and what follows.

        Args:
          tokens: int (b t).
          known: int (b), how many of these are final.
        """
        found: list[list[int]] = []
        for row, (text, count) in enumerate(zip(tokens, known, strict=True)):
            until = min(int(count), int(self._limit[row]))
            part = text[self._shown[row] : until]
            ends = np.flatnonzero(np.isin(part, self._stops))
            found.append(part[: ends[0] if len(ends) else None].tolist())
            self._shown[row] = max(until, self._shown[row])
            if len(ends):
                self._limit[row] = self._shown[row]
        return found
