"""The linear source-transition-mark recurrence on a sequence (pLSTM in one dimension).

    y_t = scale (M_t C_t q_t + D_t (q_t . k_t) v_t),    C_{t+1} = T_t C_t + S_t k_t v_t

The mark reads the state before the step: its own key and value reach an output through D alone.
With state-tracking sizes J > 1 the state is (k v jt) and gates are small matrices: T mixes jt, S
takes jk keys and jv values into it, M makes jo outputs for jq queries of it.

Pöppel et al., pLSTM: parallelizable linear source transition mark networks (2025),
arXiv:2506.11997, sections 3 and 4.1.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops.time import gating
from jaxrec.ops.time.gating import Flow, Nodes

Method = Literal["auto", "sequential", "chunkwise"]


def mark_scan(
    q: Array,
    k: Array,
    v: Array,
    source: Array,
    transition: Array,
    mark: Array,
    direct: Array,
    state: Array | None = None,
    *,
    scale: float | None = None,
    reset: Array | None = None,
    chunk: int = 32,
    method: Method = "auto",
) -> tuple[Array, Array]:
    """Runs the recurrence over the time axis.

    Args:
      q: queries (b t h k jq).
      k: keys (b t h k jk).
      v: values (b t h v jv), in one dtype with q and k.
      source: S, (b t h jt jk jv), float32 as all gates.
      transition: T, (b t h jt jt), of any sign; a spectral norm <= 1 keeps the state bounded.
      mark: M, (b t h jo jq jt).
      direct: D, (b t h jo jq jk jv).
        Where every J is 1 their axes may be left out of all seven: q (b t h k), gates (b t h).
      state: C before the first step, (b h k v jt) float32; zero if None. The axis jt is always
        there.
      scale: factor on y; None: 1 / sqrt(k).
      reset: bool (b t). True: the state that enters this step is zero.
      chunk: steps that are worked on together, at the cost of chunk^2 products for each head.
      method: "sequential" is one loop over time, the definition; "chunkwise" merges the steps of
        a chunk in logarithmic depth and loops over chunks; "auto" is sequential for a single step.

    Returns:
      y (b t h v jo), or (b t h v), in v's dtype; and the last state, float32, ready to be the next
      call's `state`.

    Raises:
      ValueError: shapes or dtypes do not fit, t is 0, chunk is below 1 or the method is unknown.
    """
    if method not in get_args(Method):
        raise ValueError(f"mark_scan: method must be one of {get_args(Method)}, got {method!r}.")
    if chunk < 1:
        raise ValueError(f"mark_scan: chunk must be >= 1, got {chunk}.")
    arrays, sizes = gating.prepared(
        "mark_scan",
        {
            "q": (q, "b t h k jq"),
            "k": (k, "b t h k jk"),
            "v": (v, "b t h v jv"),
            "source": (source, "b t h jt jk jv"),
            "transition": (transition, "b t h jt jt"),
            "mark": (mark, "b t h jo jq jt"),
            "direct": (direct, "b t h jo jq jk jv"),
        },
    )
    has_j, wide, dtype = q.ndim == 5, source.dtype, v.dtype
    batch, time, heads, keys, values, tracked = (sizes[axis] for axis in "b t h k v jt".split())
    if time == 0:
        raise ValueError(f"mark_scan: needs at least one step, got t = 0 in q of shape {q.shape}.")
    state_shape = (batch, heads, keys, values, tracked)
    if state is None:
        state = jnp.zeros_like(source, shape=state_shape)
    elif state.shape != state_shape:
        raise ValueError(
            f"mark_scan: state must be (b h k v jt) = {state_shape}, got {state.shape}."
        )
    if reset is not None:
        if reset.shape != (batch, time) or reset.dtype != jnp.bool_:
            raise ValueError(
                f"mark_scan: reset must be bool (b t) = {(batch, time)}, got {reset.dtype}"
                f" {reset.shape}."
            )
        begins = reset[:, :, None, None, None]
        for gate in ("transition", "mark"):
            arrays[gate] = jnp.where(begins, jnp.zeros((), wide), arrays[gate])
    # Inside, a head's steps are (t ... jq k) and so on, and its state is (jt k v).
    steps = Steps(*(jnp.swapaxes(arrays[x], -1, -2) for x in "qkv"), *list(arrays.values())[3:])
    steps = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), steps)
    if method == "sequential" or (method == "auto" and time == 1):
        chunk = 1
    with gating.precision(q):
        y, last = _chunkwise(steps, jnp.moveaxis(state, -1, 2).astype(wide), min(chunk, time))
    scale = keys**-0.5 if scale is None else scale
    y = jnp.swapaxes(jnp.moveaxis(y, 0, 1) * jnp.asarray(scale, wide), -1, -2).astype(dtype)
    return (y if has_j else y[..., 0]), jnp.moveaxis(last, 2, -1)


class Steps(NamedTuple):
    """The arguments of all steps, time first."""

    q: Array  # (t b h jq k)
    k: Array  # (t b h jk k)
    v: Array  # (t b h jv v)
    source: Array  # (t b h jt jk*jv)
    transition: Array  # (t b h jt jt)
    mark: Array  # (t b h jo*jq jt)
    direct: Array  # (t b h jo*jq jk*jv)


def _chunkwise(steps: Steps, state: Array, chunk: int) -> tuple[Array, Array]:
    """y (t b h jo v) and the last state (b h jt k v), from chunks that are nodes of their own.

    The gradient stores the states between chunks and works out the rest of each chunk again.
    """
    time = steps.q.shape[0]
    chunks = -(-time // chunk)
    chunk = -(-time // chunks)
    steps = _padded(steps, chunks * chunk - time)
    steps = jax.tree.map(lambda x: x.reshape(chunks, chunk, *x.shape[1:]), steps)

    @jax.checkpoint
    def step(state: Array, of_chunk: Steps) -> tuple[Array, Array]:
        q, k, v = (jnp.moveaxis(x, 0, 2) for x in of_chunk[:3])
        flow, gates = _chunk_node(of_chunk)
        y = gating.gated(q, k, v, gates) + gating.read(flow.mark, state, q)
        new = gating.passed(flow.transition, state) + gating.written(flow.source, k, v)
        return new, jnp.moveaxis(y, 2, 0)

    last, y = lax.scan(step, state, steps)
    return y.reshape(chunks * chunk, *y.shape[2:])[:time], last


def _chunk_node(steps: Steps) -> tuple[Flow, Array]:
    """The one node that the steps of a chunk make, and its gating tensor."""
    one_direction = Flow(*(x[:, :, :, None] for x in (steps.transition, steps.source, steps.mark)))
    node = gating.merged(Nodes(one_direction, None, steps.direct))
    assert node.onward is not None
    return Flow(*(x[0, :, :, 0] for x in node.onward)), node.gating[0]


def _padded(steps: Steps, more: int) -> Steps:
    """With further steps that leave the state as it is."""
    if more == 0:
        return steps

    def pad(x: Array) -> Array:
        return jnp.concatenate([x, jnp.zeros_like(x, shape=(more, *x.shape[1:]))])

    tracked = steps.transition.shape[-1]
    identity = jnp.eye(tracked, dtype=steps.transition.dtype)
    identity = jnp.broadcast_to(identity, (more, *steps.transition.shape[1:]))
    kept = jnp.concatenate([steps.transition, identity])
    return jax.tree.map(pad, steps)._replace(transition=kept)
