"""What is worth watching inside a recurrent model while it is trained, as pure functions.

    correlation     mean over i != j of cos(x_i, x_j)                     1: all tokens are alike
    effective rank  exp(-sum_k p_k log p_k),  p = eigenvalues of X^T X / their sum
    memory          -1 / log |a|, steps after which a state has decayed to 1/e of itself
    saturated       a sigmoid below 0.01 or above 0.99, where its slope is 4 % of the steepest
    divergence      KL(p^K || p^k) of the next token, K the deepest

A model whose tokens grow alike, or whose states lose their rank, has collapsed; a decay that
reaches 1 never forgets, and a saturated gate hardly learns.

Correlation as a monitor of looped models: Geiping et al. (2025), arXiv:2502.05171, section 4.3.
Effective rank: Roy & Vetterli, The effective rank (2007), here of the covariance, whose spectrum
float32 can tell from noise.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrec.ops.depth.exits import relative_change

MEMORY_EDGES = (1, 3, 10, 30, 100, 300, 1000)
"""Between the bins of the histogram of memories, in steps."""
SATURATED = 0.01
STRETCHES = 8
"""Parts of time in which the size of a stream is told apart."""


def loop_numbers(states: tuple[Array, Array]) -> dict[str, Array]:
    """Size and change of a loop's state: latent_rms, the root mean square over all, and
    latent_change, the mean over tokens of |new - old| / |new|.

    Args:
      states: before and after the loop, (b t d) each.
    """
    old, new = (x.astype(jnp.float32) for x in states)
    return {"latent_rms": _rms(new), "latent_change": jnp.mean(relative_change(new, old))}


def stream_numbers(x: Array) -> dict[str, Array]:
    """Of activations (b t d): stream_rms; stream_rms_by_time, in parts of equal length, at most
    STRETCHES; token_correlation, within rows, 1 for a single token; effective_rank, between 1 and
    d, over the tokens of all rows.
    """
    x = x.astype(jnp.float32)
    parts = np.array_split(np.arange(x.shape[1]), min(STRETCHES, x.shape[1]))
    by_time = [_rms(x[:, part[0] : part[-1] + 1]) for part in parts]
    return {
        "stream_rms": _rms(x),
        "stream_rms_by_time": jnp.stack(by_time),
        "token_correlation": token_correlation(x),
        "effective_rank": effective_rank(x),
    }


def token_correlation(x: Array) -> Array:
    """The mean cosine of different tokens of a row, over all rows of (b t d); 1 if t is 1."""
    time = x.shape[1]
    if time == 1:
        return jnp.ones((), x.dtype)
    unit = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), jnp.finfo(x.dtype).tiny)
    total = jnp.sum(jnp.square(jnp.sum(unit, axis=1)), axis=-1)  # of all pairs, i = j among them
    return jnp.mean((total - jnp.sum(jnp.square(unit), axis=(1, 2))) / (time * (time - 1)))


def effective_rank(x: Array) -> Array:
    """exp of the entropy of the normalised eigenvalues of X^T X, X the tokens of (b t d); 1 if all
    are zero.
    """
    rows = x.reshape(-1, x.shape[-1])
    rows = rows / jnp.maximum(jnp.max(jnp.abs(rows)), jnp.finfo(x.dtype).tiny)
    left, right = (rows, rows.T) if rows.shape[0] < rows.shape[1] else (rows.T, rows)
    product = jnp.matmul(left, right, precision="highest")
    eigenvalues = jnp.maximum(jnp.linalg.eigvalsh(product), 0)
    share = eigenvalues / jnp.maximum(jnp.sum(eigenvalues), jnp.finfo(x.dtype).tiny)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share)))


def decay_numbers(a: Array) -> dict[str, Array]:
    """Of the factors (...), real or complex, by which states decay in a step: largest_decay, the
    largest |a|, and memory_steps, the shares whose memory lies between the MEMORY_EDGES.
    """
    size = jnp.abs(a).astype(jnp.float32)
    edges = [math.exp(-1 / edge) for edge in MEMORY_EDGES]
    beyond = [jnp.mean((size >= edge).astype(jnp.float32)) for edge in edges]
    cumulative = jnp.stack([jnp.ones(()), *beyond, jnp.zeros(())])
    return {"largest_decay": jnp.max(size), "memory_steps": cumulative[:-1] - cumulative[1:]}


def gate_numbers(gate: Array) -> dict[str, Array]:
    """Of sigmoids (...): saturated_gates, the share of them that hardly has a gradient."""
    gate = gate.astype(jnp.float32)
    saturated = (gate < SATURATED) | (gate > 1 - SATURATED)
    return {"saturated_gates": jnp.mean(saturated.astype(jnp.float32))}


def memory_numbers(state: Array) -> dict[str, Array]:
    """Of states (...), real or complex: memory_rms, their root mean square."""
    return {"memory_rms": _rms(jnp.abs(state).astype(jnp.float32))}


def solver_numbers(states: tuple[Array, Array]) -> dict[str, Array]:
    """Of states solved for all steps at once and of the same one step after another, (b t ...)
    each: newton_error, the largest difference, relative to the largest number if that is above 1.
    """
    solved, exact = states
    largest = jnp.maximum(jnp.max(jnp.abs(exact)), 1)
    return {"newton_error": jnp.max(jnp.abs(solved - exact)) / largest}


def divergence(deepest: Array, logits: Array) -> Array:
    """KL(softmax(deepest) || softmax(logits)) over the last axis, in nats."""
    log_p, log_q = jax.nn.log_softmax(deepest), jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _rms(x: Array) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))
