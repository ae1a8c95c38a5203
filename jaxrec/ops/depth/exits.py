"""When a loop in depth may end, token by token: what each criterion measures.

    latent-diff        |s^k - s^{k-1}| / |s^k|                      below t
    cosine             1 - cos(s^k, s^{k-1})                        below t
    entropy-diff       |H(p^k) - H(p^{k-1})|                        below t
    kl                 KL(p^{k-1} || p^k)                           below t
    minp-kl            kl of p with its improbable tokens levelled  below t
    argmax-stability   checks in a row with the same argmax p^k     t or more

s^k is the latent state after k loops, p^k the distribution of the next token read from it; k-1 is
the check before.

Geiping et al. (2025), arXiv:2502.05171, section 6.1; thresholds are those of its published code.
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

Criterion = Literal["latent-diff", "cosine", "entropy-diff", "kl", "minp-kl", "argmax-stability"]
THRESHOLDS: dict[Criterion, float] = {
    "latent-diff": 0.03,
    "cosine": 1e-3,
    "entropy-diff": 1e-3,
    "kl": 1e-3,
    "minp-kl": 1e-5,
    "argmax-stability": 5,
}
MIN_P = 0.1  # tokens less than so many times as probable as the best are improbable
FIRST_ENTROPY = 100.0  # before the first check: above that of any vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exit:
    """A criterion, its threshold and when it is looked at."""

    criterion: Criterion
    threshold: float | None = None  # None: the published one
    min_loops: int = 1  # first looked at after so many loops
    every: int = 1  # and then after every so many
    in_prompt: bool = True  # also while a prompt is read; otherwise that has its full depth

    def __post_init__(self) -> None:
        if self.criterion not in get_args(Criterion):
            raise ValueError(
                f"Exit criterion must be one of {', '.join(get_args(Criterion))},"
                f" got {self.criterion!r}."
            )
        if self.threshold is not None and not 0 < self.threshold < float("inf"):
            raise ValueError(
                f"The exit threshold of {self.criterion} must be > 0 and finite, got"
                f" {self.threshold}. The published one is {THRESHOLDS[self.criterion]:g}."
            )
        for name in ("min_loops", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"Exit: {name} must be >= 1, got {getattr(self, name)}.")

    @property
    def limit(self) -> float:
        """The threshold in use."""
        return THRESHOLDS[self.criterion] if self.threshold is None else self.threshold

    @property
    def reads_output(self) -> bool:
        """The criterion looks at the next token's distribution, not at the latent state."""
        return self.criterion not in ("latent-diff", "cosine")

    def is_checked(self, loops: Array) -> Array:
        """Whether the criterion is looked at after so many loops, bool ()."""
        return (loops >= self.min_loops) & ((loops - self.min_loops) % self.every == 0)

    def begin(self, latent: Array, vocab_size: int) -> Any:
        """What is remembered from check to check; at first the initial latent states (b t d), or
        what no distribution equals.
        """
        rows = latent.shape[0]
        match self.criterion:
            case "entropy-diff":
                return jnp.full(rows, FIRST_ENTROPY)
            case "kl" | "minp-kl":
                return jnp.full((rows, vocab_size), -jnp.log(vocab_size * 1.0))
            case "argmax-stability":
                return jnp.full(rows, -1, jnp.int32), jnp.zeros(rows, jnp.int32)
            case _:
                return latent

    def of_latents(self, new: Array, old: Array, is_token: Array) -> Array:
        """The value (b) of a criterion of latent states (b t d): the mean over a row's tokens; NaN,
        which ends nothing, for the cosine with a state that is zero.

        is_token: bool (b t), False for padding.
        """
        if self.criterion == "cosine":
            each = cosine_distance(new, old)
        else:
            each = relative_change(new, old)
        count = jnp.sum(is_token, axis=1, dtype=jnp.float32)
        return jnp.sum(jnp.where(is_token, each, 0.0), axis=1) / count

    def of_logits(self, logits: Array, memory: Any) -> tuple[Array, Any]:
        """The value (b) of a criterion of the next token's logits (b vocab), and the new memory."""
        match self.criterion:
            case "entropy-diff":
                new = entropy(logits)
                return jnp.abs(new - memory), new
            case "argmax-stability":
                last, count = memory
                best = jnp.argmax(logits, axis=1).astype(jnp.int32)
                count = jnp.where(best == last, count + 1, 0)
                return count.astype(jnp.float32), (best, count)
            case _:
                log_p = jax.nn.log_softmax(logits, axis=1)
                if self.criterion == "minp-kl":
                    log_p = levelled(log_p)
                return jnp.sum(jnp.exp(memory) * (memory - log_p), axis=1), log_p

    def holds(self, value: Array) -> Array:
        """Whether a value ends the loop."""
        return value >= self.limit if self.criterion == "argmax-stability" else value < self.limit


def relative_change(new: Array, old: Array) -> Array:
    """|new - old| / |new| over the last axis."""
    return jnp.linalg.norm(new - old, axis=-1) / jnp.linalg.norm(new, axis=-1)


def cosine_distance(new: Array, old: Array) -> Array:
    """1 - cos(new, old) over the last axis."""
    norms = jnp.linalg.norm(new, axis=-1) * jnp.linalg.norm(old, axis=-1)
    return 1 - jnp.sum(new * old, axis=-1) / norms


def entropy(logits: Array) -> Array:
    """H(softmax(logits)) over the last axis, in nats."""
    p = jax.nn.softmax(logits, axis=-1)
    return -jnp.sum(p * jnp.log(p + 1e-10), axis=-1)


def levelled(log_p: Array) -> Array:
    """Log of p (b vocab) with all below MIN_P of the largest set to 1/vocab, normalised again."""
    p = jnp.exp(log_p)
    is_low = p < MIN_P * jnp.max(p, axis=1, keepdims=True)
    p = jnp.where(is_low, 1 / p.shape[1], p)
    return jnp.log(p / jnp.sum(p, axis=1, keepdims=True))
