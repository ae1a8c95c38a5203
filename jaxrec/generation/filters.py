"""What is done to the scores of the next token before one is drawn.

Every filter maps logits (b vocab), float32, to logits of the same shape; a token that it rejects
gets -inf, and at least one token is kept. All parameters may be traced, so that another value
compiles nothing.
"""

import jax
import jax.numpy as jnp
from jax import Array


def temperature(logits: Array, value: Array | float) -> Array:
    """logits / value: below 1 sharpens the distribution, above 1 flattens it; value > 0."""
    return logits / value


def top_k(logits: Array, k: Array | int) -> Array:
    """Keeps the k tokens with the largest logits, 1 <= k; of equal ones those that come first.

    Fan et al., Hierarchical neural story generation (2018), arXiv:1805.04833.
    """
    order = _descending(logits)
    rank = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return _keep(logits, order, rank < k)


def top_p(logits: Array, p: Array | float) -> Array:
    """Keeps the smallest set of most probable tokens that sum to p or more, 0 < p <= 1.

    In descending order, token i stays if sum_{j < i} softmax(logits)_j < p: the token that crosses
    p stays too, as in the paper. Huginn's published sampler drops it, except as the first.

    Holtzman et al., The curious case of neural text degeneration (2019), arXiv:1904.09751.
    """
    order = _descending(logits)
    probability = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=1), axis=1)
    mass = jnp.cumsum(probability, axis=1)
    mass_before = jnp.concatenate([jnp.zeros_like(mass[:, :1]), mass[:, :-1]], axis=1)
    return _keep(logits, order, mass_before < p)


def min_p(logits: Array, p: Array | float) -> Array:
    """Keeps the tokens at least p times as probable as the most probable one, 0 < p <= 1.

    softmax_i >= p max_j softmax_j, that is logits_i >= max_j logits_j + log p.

    Nguyen et al., Turning up the heat: min-p sampling (2024), arXiv:2407.01082.
    """
    threshold = jnp.max(logits, axis=1, keepdims=True) + jnp.log(p)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def repetition_penalty(logits: Array, present: Array, penalty: Array | float) -> Array:
    """Makes tokens of the text so far less likely: x / penalty for logits x > 0, else x * penalty.

    Args:
      logits: (b vocab).
      present: bool (b vocab), True for the tokens of the text so far.
      penalty: above 1 discourages, 1 does nothing; > 0.

    Keskar et al., CTRL: a conditional transformer language model (2019), arXiv:1909.05858,
    section 4.1; the sign rule is that of its published code.
    """
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(present, penalised, logits)


def _descending(logits: Array) -> Array:
    """int (b vocab): token ids from the most to the least probable."""
    return jnp.argsort(logits, axis=1, descending=True, stable=True)


def _keep(logits: Array, order: Array, kept: Array) -> Array:
    """Logits, -inf where `kept` (b vocab), which is in the order of `order`, says no."""
    rows = jax.lax.broadcasted_iota(order.dtype, order.shape, 0)
    mask = jnp.zeros_like(kept).at[rows, order].set(kept, unique_indices=True)
    return jnp.where(mask, logits, -jnp.inf)
