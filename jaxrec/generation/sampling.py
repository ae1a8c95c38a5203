"""From the scores of the next token to the token: which filters, in which order, and the draw."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrec.generation import filters


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn: the penalty first, then each filter in order of the fields."""

    temperature: float = 1.0  # 0: the most probable token, nothing is drawn
    top_k: int | None = None  # only the k most probable; >= 1
    top_p: float | None = None  # only the most probable that sum to p; in (0, 1]
    min_p: float | None = None  # only those at least p times as probable as the best; in [0, 1]
    repetition_penalty: float = 1.0  # > 1 discourages tokens that prompt or text already have

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be >= 0 and finite, got {self.temperature}."
                " 0 takes the most probable token."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {self.top_k}. Leave it out to keep all.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}. 1 keeps all tokens.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}. 0 keeps all tokens.")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty must be > 0 and finite, got {self.repetition_penalty}."
                " 1 does nothing."
            )

    @property
    def is_greedy(self) -> bool:
        """The most probable token is taken and no randomness is needed."""
        return self.temperature == 0


class Sampling(NamedTuple):
    """A `SamplingConfig` as arrays: another value compiles nothing, another set of filters does."""

    temperature: Array | None  # None: greedy
    top_k: Array | None
    top_p: Array | None
    min_p: Array | None
    repetition_penalty: Array | None

    @classmethod
    def of(cls, config: SamplingConfig) -> "Sampling":
        """Float32 and int32 scalars; None for what would change nothing."""

        def scalar(value: float | None, neutral: float) -> Array | None:
            is_off = value is None or value == neutral
            return None if is_off else jnp.asarray(value, jnp.float32)

        penalty = scalar(config.repetition_penalty, 1.0)
        if config.is_greedy:
            return cls(None, None, None, None, penalty)
        return cls(
            temperature=jnp.asarray(config.temperature, jnp.float32),
            top_k=None if config.top_k is None else jnp.asarray(config.top_k, jnp.int32),
            top_p=scalar(config.top_p, 1.0),
            min_p=scalar(config.min_p, 0.0),
            repetition_penalty=penalty,
        )


def draw(
    logits: Array, sampling: Sampling, keys: Array | None, present: Array | None = None
) -> Array:
    """Draws one token per row.

    Args:
      logits: (b vocab), float32.
      sampling: temperature and filters.
      keys: one PRNG key per row, (b); unused and possibly None when greedy.
      present: bool (b vocab), the tokens of the text so far; needed for a repetition penalty only.

    Returns:
      int32 (b).
    """
    if sampling.repetition_penalty is not None:
        assert present is not None, "a repetition penalty needs the tokens that are present"
        logits = filters.repetition_penalty(logits, present, sampling.repetition_penalty)
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=1).astype(jnp.int32)
    assert keys is not None, "drawing needs one key per row"
    logits = filters.temperature(logits, sampling.temperature)
    if sampling.top_k is not None:
        logits = filters.top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = filters.top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = filters.min_p(logits, sampling.min_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def draw_at(
    logits: Array,
    sampling: Sampling,
    key: Array | None,
    step: Array,
    tokens: Array,
    known: Array,
) -> Array:
    """Draws the tokens of several steps of one row, each as `generate` draws it.

    Args:
      logits: (n vocab), float32.
      sampling: temperature and filters.
      key: PRNG key () of the row; unused and possibly None when greedy.
      step: int32 (n), which token after the prompt each is, from 0.
      tokens: int32 (t), the text.
      known: int32 (n), how many tokens of the text come before each.

    Returns:
      int32 (n).
    """
    keys, present = None, None
    if key is not None:
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, step)
    if sampling.repetition_penalty is not None:
        is_text = jnp.arange(tokens.shape[0])[None] < known[:, None]
        present = jnp.zeros(logits.shape, jnp.bool_).at[:, tokens].max(is_text)
    return draw(logits, sampling, keys, present)
