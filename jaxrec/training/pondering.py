"""Deep supervision of a model that refines its answer in segments and learns when to halt.

A row whose puzzle has halted takes the next puzzle that is offered. Then, with R = 1 if all tokens
of the answer are right,

    loss = -log p(labels) + (BCE(q_halt, R) + BCE(q_continue, target)) / 2
    target = sigmoid(q_halt' if this was the last segment, else max(q_halt', q_continue'))

where q' is of the segment after this one. A row halts when q_halt > q_continue, or after the last
segment; a drawn share of the rows goes on for a drawn number of segments at least.

Wang et al., Hierarchical reasoning model (2025), arXiv:2506.21734, section 2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxrec.models.hrm import HRM, Carry, Rows
from jaxrec.ops import notes
from jaxrec.ops.depth import RematPolicy, remat_scan
from jaxrec.ops.stablemax import log_stablemax
from jaxrec.training.data.batches import IGNORED


class Draws(NamedTuple):
    """What exploration draws for each row."""

    uniform: Array  # float32 (b) in [0, 1); below `exploration` the row explores
    least: Array  # int32 (b) in [2, max_segments]: segments that an exploring row has at least


class Segment(NamedTuple):
    """What a segment gave."""

    carry: Carry
    logits: Array  # (b s vocab)
    q: Array  # (b 2): of halting and of going on
    target: Array | None  # (b): what q_continue learns; None in evaluation
    metrics: dict[str, Array]  # sums over the rows that halted, `count` of them; losses over all


def draws(key: Array, batch: int, max_segments: int) -> Draws:
    """Draws of one segment."""
    of_uniform, of_least = jax.random.split(key)
    uniform = jax.random.uniform(of_uniform, (batch,))
    least = jax.random.randint(of_least, (batch,), min(2, max_segments), max_segments + 1)
    return Draws(uniform, least)


def take_next(model: HRM, carry: Carry, offered: Rows[Array]) -> Carry:
    """Gives the rows that have halted the puzzles that are offered; the others keep theirs."""

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(carry.halted.reshape(-1, *(1 for _ in old.shape[1:])), new, old)

    return Carry(
        latent=jax.tree.map(choose, model.start(carry.steps.shape[0]), carry.latent),
        steps=choose(jnp.zeros_like(carry.steps), carry.steps),
        halted=jnp.zeros_like(carry.halted),
        rows=jax.tree.map(choose, offered, carry.rows),
    )


def segment(
    model: HRM,
    carry: Carry,
    vectors: Array | None,
    explore: Draws | None = None,
    *,
    remat: RematPolicy = "none",
) -> tuple[Array, Segment]:
    """Runs one segment and says how good it was.

    Args:
      model: the model.
      carry: from `take_next`.
      vectors: of the carried puzzles, from `HRM.vectors_of`; given so that their gradient is that
        of few rows of a large table.
      explore: draws, in training; None in evaluation, where rows halt after the last segment only
        and q_continue has no target.
      remat: see `HRM`.

    Returns:
      The loss, summed over the batch, and what came out. The gradient reaches neither the carry nor
      the target.
    """
    config, rows = model.config, carry.rows
    logits, q, latent = model(rows.tokens, carry.latent, vectors, remat=remat)
    steps = carry.steps + 1
    last = steps >= config.max_segments
    latent = jax.lax.stop_gradient(latent)
    halted, target = last, None
    if explore is not None and config.max_segments > 1:
        least = jnp.where(explore.uniform < config.exploration, explore.least, 0)
        halted = (last | (q[:, 0] > q[:, 1])) & (steps >= least)
        fixed_model, fixed_vectors = jax.lax.stop_gradient((model, vectors))
        _, after, _ = fixed_model(rows.tokens, latent, fixed_vectors)
        target = jax.nn.sigmoid(jnp.where(last, after[:, 0], jnp.max(after, axis=-1)))

    asked = rows.labels != IGNORED
    labels = jnp.where(asked, rows.labels, 0)
    normaliser = log_stablemax if config.normaliser == "stablemax" else jax.nn.log_softmax
    chosen = jnp.take_along_axis(normaliser(logits), labels[..., None], axis=-1)[..., 0]
    answers = jnp.sum(asked, axis=-1, dtype=jnp.int32)
    surprise = jnp.sum(jnp.where(asked, -chosen, 0), axis=-1)
    right, solved = scores(logits, rows.labels)

    losses = {
        "answer_loss": jnp.sum(surprise / jnp.maximum(answers, 1).astype(jnp.float32)),
        "q_halt_loss": _binary(q[:, 0], solved.astype(jnp.float32)),
    }
    if target is not None:
        losses["q_continue_loss"] = _binary(q[:, 1], target)
    loss = losses["answer_loss"] + sum(
        (value / 2 for name, value in losses.items() if name != "answer_loss"), start=0.0
    )
    counts = halted & (answers > 0)

    def total(x: Array) -> Array:
        return jnp.sum(jnp.where(counts, x, jnp.zeros((), x.dtype)))

    metrics = losses | {
        "count": total(jnp.ones_like(steps)),
        "accuracy": total(right),
        "exact_accuracy": total(solved.astype(jnp.int32)),
        "q_halt_accuracy": total(((q[:, 0] >= 0) == solved).astype(jnp.int32)),
        "segments": total(steps),
    }
    return loss, Segment(Carry(latent, steps, halted, rows), logits, q, target, metrics)


class Solution(NamedTuple):
    """What a model answers after each of M segments."""

    answers: Array  # int32 (M b s): the best token of every place
    right: Array  # float32 (M b): share of the asked tokens that are right
    solved: Array  # bool (M b): all of them are
    q: Array  # float32 (M b 2): of halting and of going on


def solve(model: HRM, rows: Rows[Array]) -> Solution:
    """Lets puzzles have as many segments as the model may take."""
    vectors = model.vectors_of(rows.puzzle)

    def body(carry: Carry, _: None) -> tuple[Carry, Solution]:
        now = segment(model, carry, vectors)[1]
        notes.note("answer", now.logits)
        answers = jnp.argmax(now.logits, axis=-1).astype(jnp.int32)
        return now.carry, Solution(answers, *scores(now.logits, rows.labels), now.q)

    carry = take_next(model, model.init_carry(rows), rows)
    return remat_scan(body, carry, None, length=model.config.max_segments)[1]


def scores(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Share of the asked tokens that are right, float32 (b), and whether all are, bool (b).

    Args:
      logits: (b s vocab).
      labels: int (b s); IGNORED where nothing is asked.
    """
    asked = labels != IGNORED
    right = jnp.sum(asked & (jnp.argmax(logits, axis=-1) == labels), axis=-1, dtype=jnp.int32)
    answers = jnp.sum(asked, axis=-1, dtype=jnp.int32)
    return right.astype(jnp.float32) / jnp.maximum(answers, 1).astype(jnp.float32), right == answers


def _binary(logits: Array, probability: Array) -> Array:
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, probability))
