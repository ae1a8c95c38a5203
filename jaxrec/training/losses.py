"""Losses of language models."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxrec.training.data.batches import IGNORED


def token_losses(logits: Array, labels: Array, penalty: Array | None = None) -> tuple[Array, Array]:
    """Negative log-likelihood of every label.

    Args:
      logits: (b t vocab), float32.
      labels: int (b t); the token that follows, or IGNORED.
      penalty: (b t), added to the losses of labels that count; None: nothing.

    Returns:
      Losses (b t) in nats, 0 where ignored, and bool (b t) where a label counts.
    """
    counts = labels != IGNORED
    target = jnp.where(counts, labels, 0)
    log_total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    losses = log_total - chosen
    if penalty is not None:
        losses = losses + penalty
    return jnp.where(counts, losses, 0.0), counts


def cross_entropy(logits: Array, labels: Array, penalty: Array | None = None) -> Array:
    """Mean negative log-likelihood over the labels that count, in nats, and of the penalty (b t);
    0 if none does.
    """
    losses, counts = token_losses(logits, labels, penalty)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(counts, dtype=losses.dtype), 1)
