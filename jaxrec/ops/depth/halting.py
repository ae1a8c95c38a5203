"""Adaptive computation time: how much of each loop's state becomes a position's output.

Before loop t a position says with probability p_t that it is done. It goes on while the sum h of
its probabilities stays at most 1 - epsilon; the loop in which it would exceed that gets the
remainder 1 - h. With u_t = p_t, the remainder, or 0 after that, the outputs are combined by a rule:

    interpolate   out <- u_t s_t + (1 - u_t) out     as the original of the Universal Transformer
    accumulate    out <- out + u_t s_t               the mean of Graves, whose weights sum to 1
    copy-halted   as accumulate, and the state of a halted position stays what it was

s_t is the state after loop t. Under the first two, halted positions go on changing their state,
which others may look at; only their output is settled. Gradients reach p through u and the
remainder, not through counts.

Graves, Adaptive computation time for recurrent neural networks (2016), arXiv:1603.08983, section 2;
Dehghani et al., Universal transformers (2018), arXiv:1807.03819, section 2.2 and appendix C.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops import notes
from jaxrec.ops.depth.remat import RematPolicy, remat_scan

Rule = Literal["interpolate", "accumulate", "copy-halted"]


class Halting(NamedTuple):
    """Where the positions stand; all (b t) float32 but `output`."""

    halted: Array  # h: sum of the probabilities so far, 1 once a position has halted
    remainder: Array  # what the last loop of a position got; 0 before
    updates: Array  # loops that counted
    output: Array  # (b t d)


def begin_halting(state: Array) -> Halting:
    """Nothing halted and an output of zero for states (b t d)."""
    zeros = jnp.zeros(state.shape[:2])
    return Halting(zeros, zeros, zeros, jnp.zeros_like(state))


def halt(
    before: Halting, probability: Array, new: Array, *, rule: Rule, epsilon: float = 0.01
) -> Halting:
    """Counts one loop.

    Args:
      before: after the loops so far.
      probability: p_t in (0, 1), (b t), of the state before this loop.
      new: s_t, the state after it, (b t d).
      rule: how outputs are combined.
      epsilon: how much of 1 may be missing for a position to have halted.

    Returns:
      After this loop.

    Raises:
      ValueError: the rule is unknown.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"halt: rule must be one of {get_args(Rule)}, got {rule!r}.")
    is_running = before.halted < 1
    exceeds = before.halted + probability > 1 - epsilon
    ends = (is_running & exceeds).astype(jnp.float32)
    goes_on = (is_running & ~exceeds).astype(jnp.float32)
    halted = before.halted + probability * goes_on
    remainder = before.remainder + ends * (1 - halted)
    weight = (probability * goes_on + ends * remainder)[..., None].astype(new.dtype)
    kept = 1 - weight if rule == "interpolate" else jnp.ones_like(weight)
    return Halting(
        halted=halted + ends * remainder,
        remainder=remainder,
        updates=before.updates + goes_on + ends,
        output=weight * new + kept * before.output,
    )


class Adapted(NamedTuple):
    """How an adaptive loop ended."""

    halting: Halting
    ponder: Array  # (b t): loops that counted, without gradient, plus the remainder
    state: Array  # (b t d), of the last loop
    memory: Any
    loops: Array  # int32 (): loops run


_Carry = tuple[Array, Any, Halting]


def adaptive_loop(
    step: Callable[[Array, Array, Any], tuple[Array, Any]],
    probability: Callable[[Array], Array],
    prepare: Callable[[Array, Array], Array],
    state: Array,
    max_loops: int,
    *,
    memory: Any = None,
    rule: Rule = "interpolate",
    epsilon: float = 0.01,
    differentiable: bool = True,
    remat: RematPolicy = "none",
) -> Adapted:
    """Loops until every position has halted.

    Args:
      step: (prepared state, t, memory) -> state, memory, over all positions (b t d).
      probability: prepared state -> p (b t).
      prepare: (state, t) -> state, such as the coordinates of position and loop, added every time.
      state: the first state (b t d).
      max_loops: positions that have not halted by then keep what they have.
      memory: what loops hand on beside the state, such as a cache; any pytree.
      rule: how outputs are combined.
      epsilon: see `halt`.
      differentiable: a scan over max_loops; otherwise a loop that ends as soon as it may, with the
        same output and no reverse derivative.
      remat: what the gradient of the scan stores, see `remat_scan`.

    Returns:
      The halting, whose `output` is the result; the ponder time, whose mean over real positions is
      the ponder loss; and what the last loop left.
    """

    def advance(carry: _Carry, t: Array) -> _Carry:
        state, memory, before = carry
        prepared = prepare(state, t)
        p = probability(prepared).astype(jnp.float32)
        new, memory = step(prepared, t, memory)
        after = halt(before, p, new, rule=rule, epsilon=epsilon)
        if rule == "copy-halted":
            new = jnp.where((before.halted < 1)[..., None], new, state)
        notes.note("loop", (state, new))
        return new, memory, after

    carry = (state, memory, begin_halting(state))
    if differentiable:
        carry, _ = remat_scan(
            lambda carry, t: (advance(carry, t), None),
            carry,
            jnp.arange(max_loops, dtype=jnp.int32),
            remat=remat,
        )
        loops = jnp.asarray(max_loops, jnp.int32)
    else:
        unheard = notes.silently(advance)

        def busy(loop: tuple[_Carry, Array]) -> Array:
            (_, _, halting), t = loop
            return (t < max_loops) & jnp.any(halting.halted < 1)

        carry, loops = lax.while_loop(
            busy,
            lambda loop: (unheard(*loop), loop[1] + 1),
            (carry, jnp.zeros((), jnp.int32)),
        )
    state, memory, end = carry
    return Adapted(end, lax.stop_gradient(end.updates) + end.remainder, state, memory, loops)


def ponder_loss(ponder: Array, is_token: Array | None = None) -> Array:
    """The mean ponder time (b t) over positions, or over those of a mask, bool (b t)."""
    if is_token is None:
        return jnp.mean(ponder)
    total = jnp.sum(jnp.where(is_token, ponder, 0.0))
    return total / jnp.maximum(jnp.sum(is_token, dtype=jnp.float32), 1.0)


def global_probability(probability: Array, is_token: Array | None = None) -> Array:
    """One probability for all positions of a row: the mean of p (b t), or of p where a mask, bool
    (b t), is True; (b t).
    """
    if is_token is None:
        mean = jnp.mean(probability, axis=1, keepdims=True)
    else:
        total = jnp.sum(jnp.where(is_token, probability, 0.0), axis=1, keepdims=True)
        mean = total / jnp.maximum(jnp.sum(is_token, axis=1, keepdims=True, dtype=jnp.float32), 1.0)
    return jnp.broadcast_to(mean, probability.shape)
