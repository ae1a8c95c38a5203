"""The linear recurrence whose state is a matrix: keys write values into it, queries read it.

    gated   S_t = exp(g_t) S_{t-1} + k_t v_t^T                                    y_t = S_t^T q_t
    delta   S' = exp(g_t) S_{t-1},   S_t = S' + beta_t k_t (v_t - S'^T k_t)^T     y_t = S_t^T q_t

The delta rule takes out what the state holds for k_t before it writes. With the right decays these
are linear attention, RetNet, GLA, Mamba-2's scan, DeltaNet, Gated DeltaNet and KDA.

In the chunkwise form a chunk of time is an affine map of the state S that enters it. With b_i the
sum of g_1 .. g_i, A_ij = (q_i e^{b_i - b_j}) . k_j for i >= j, and a weight e^{b_i} on row i of Q,

    gated   y = A V + (Q e^b) S,                      S <- e^{b_C} S + (K e^{b_C - b})^T V
    delta   (I + strictly lower(beta A_kk)) [U W] = beta [V  (K e^b)],   the same with V = U - W S,

where A_kk is A of keys with keys. All chunks find their maps at once, the maps run one after the
other, and then all chunks read at once. The gradient is written by hand: the same maps, transposed,
run from the last to the first, and what is inside the chunks is computed again. Heads that share
their keys have their states side by side, (k, r v) for r heads: Q K^T is found once, and one wide
product writes or reads all of them.

Yang et al., Gated linear attention transformers with hardware-efficient training (2023),
arXiv:2312.06635, section 4; Yang et al., Parallelizing linear transformers with the delta rule over
sequence length (2024), arXiv:2406.06484, section 3; Yang et al., Gated delta networks (2024),
arXiv:2412.06464; Kimi Linear (2025), arXiv:2510.26692 (KDA).
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrec.ops.kept import kept
from jaxrec.ops.time.chunk import decayed_products, running_sums, solve, zero_decay
from jaxrec.ops.time.loop import over_time
from jaxrec.ops.time.scan import linear_scan, shifted

Rule = Literal["gated", "delta"]
Method = Literal["auto", "sequential", "chunkwise"]
UNROLLED_CHUNKS = 8
"""Chunks whose decays run in one round of a loop on CPU: XLA makes one pass over memory of them."""


class Inputs(NamedTuple):
    """What the steps take, (b t h ...), or (b n h c ...) in n chunks of c steps.

    A key is shared by h / g heads in a row, unless the rule or the decay makes them differ: g is h.
    """

    q: Array  # (b t g k)
    k: Array  # (b t g k)
    v: Array  # (b t h v)
    log_decay: Array | None  # (b t h 1) or (b t h k); None: no decay
    beta: Array | None  # (b t h 1); None: the gated rule


def matrix_scan(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None = None,
    state: Array | None = None,
    *,
    beta: Array | None = None,
    rule: Rule = "gated",
    normalise: float | None = None,
    reset: Array | None = None,
    chunk: int = 64,
    method: Method = "auto",
) -> tuple[Array, Array]:
    """Runs S_t = exp(g_t) S_{t-1} + k_t v_t^T, or the delta rule, and reads y_t = S_t^T q_t.

    Args:
      q: queries (b t g k), t >= 1; not scaled here. Each is that of h / g heads in a row: g divides
        h, and is h where every head has its own.
      k: keys (b t g k); not normalised here. The delta rule multiplies the state by
        I - beta_t k_t k_t^T, which only contracts if beta_t |k_t|^2 <= 2: normalise its keys.
      v: values (b t h v).
      log_decay: g <= 0, (b t h) for every head or (b t h k) for every row of its state; None: 0.
      state: S before the first step, (b h k v) float32; zero if None.
      beta: how much of the old value the delta rule replaces, (b t h); None: all, 1.
      rule: "gated" or "delta".
      normalise: None, or epsilon of y_t / (z_t . q_t + epsilon), with z the equally decayed sum of
        the keys; gated rule only. z is the last column of the state, which is (b h k v+1) then.
      reset: bool (b t). True: the state that enters this step is zero. It is a decay of zero: a
        state that has overflowed to infinity is not stopped by it.
      chunk: steps that are worked on together, at the cost of c x c products for each head, rounded
        up to a power of two; the gradient keeps t / chunk states.
      method: "sequential" is one loop over time, the definition; "chunkwise" has depth t / chunk
        and consists of matrix products; "auto" is sequential for a single step.

    Returns:
      y (b t h v) in v's dtype, and the last state, float32 (float64 for such inputs), ready to be
      the next call's `state`. Decays, sums and the state itself are in the dtype of the state. Log
      decays below -128 (float64: -1024) count as that, whose exponential is zero.

    Raises:
      ValueError: shapes or dtypes do not fit, t is 0, chunk is below 1, the rule or the method is
        unknown, beta comes without the delta rule, normalise with it, or a log decay is positive.
        Under `jit`, where its value is not known, a positive one makes NaN from its step on.
    """
    inputs, state = prepare(
        "matrix_scan", q, k, v, log_decay, state, beta, rule, normalise, reset, chunk
    )
    if method not in get_args(Method):
        raise ValueError(f"matrix_scan: method must be one of {get_args(Method)}, got {method!r}.")
    if method == "sequential" or (method == "auto" and q.shape[1] == 1):
        y, last = _sequential(inputs, state, chunk)
    else:
        y, last = _chunkwise(inputs, state, chunk)
    return finished(y, normalise, v.dtype), last


def prepare(
    name: str,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    state: Array | None,
    beta: Array | None,
    rule: Rule,
    normalise: float | None,
    reset: Array | None,
    chunk: int,
) -> tuple[Inputs, Array]:
    """The arguments of `matrix_scan`, checked, with resets in the decay and with what `normalise`
    adds to the values; decays, beta and the state in the dtype of the state.
    """
    wide = _check(name, q, k, v, log_decay, state, beta, rule, normalise, reset, chunk)
    batch, _, groups, keys = q.shape
    heads = v.shape[2]
    if groups < heads and (rule == "delta" or (log_decay is not None and log_decay.ndim == 4)):
        q, k = (jnp.repeat(x, heads // groups, axis=2) for x in (q, k))
    if normalise is not None:
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    if state is None:
        state = jnp.zeros((batch, heads, keys, v.shape[-1]), wide)
    if log_decay is not None:
        g = log_decay.astype(wide)
        g = jnp.where(g > 0, jnp.nan, jnp.maximum(g, zero_decay(wide)))
        log_decay = g[..., None] if g.ndim == 3 else g
    if reset is not None:
        if log_decay is None:
            log_decay = jnp.zeros_like(v[..., :1], wide)
        log_decay = jnp.where(reset[:, :, None, None], zero_decay(wide), log_decay)
    if rule == "delta":
        beta = jnp.ones_like(v[..., :1], wide) if beta is None else beta.astype(wide)[..., None]
    return Inputs(q, k, v, log_decay, beta), state.astype(wide)


def finished(y: Array, normalise: float | None, dtype: Any) -> Array:
    """What is returned of what the state was read as."""
    if normalise is not None:
        y = y[..., :-1] / (y[..., -1:] + normalise)
    return y.astype(dtype)


def _check(
    name: str,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    state: Array | None,
    beta: Array | None,
    rule: Rule,
    normalise: float | None,
    reset: Array | None,
    chunk: int,
) -> jnp.dtype:
    """Refuses what does not fit; returns the dtype in which the recurrence runs."""
    if rule not in get_args(Rule):
        raise ValueError(f"{name}: rule must be one of {get_args(Rule)}, got {rule!r}.")
    if chunk < 1:
        raise ValueError(f"{name}: chunk must be >= 1, got {chunk}.")
    if beta is not None and rule != "delta":
        raise ValueError(f"{name}: beta belongs to the delta rule, got rule={rule!r}.")
    if normalise is not None and rule != "gated":
        raise ValueError(f"{name}: normalise belongs to the gated rule, got rule={rule!r}.")
    given = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta, "state": state}
    floats = {letter: x for letter, x in given.items() if x is not None}
    for letter, x in floats.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}: {letter} must be real floats, got {x.dtype}.")
    if q.ndim != 4:
        raise ValueError(f"{name}: q must be (b t g k), got shape {q.shape}.")
    batch, time, groups, keys = q.shape
    if time == 0:
        raise ValueError(f"{name}: needs at least one step, got t = 0 in q of shape {q.shape}.")
    if k.shape != q.shape:
        raise ValueError(f"{name}: k must be (b t g k) = {q.shape} as q, got {k.shape}.")
    if v.ndim != 4 or v.shape[:2] != q.shape[:2] or v.shape[2] % groups:
        raise ValueError(
            f"{name}: v must be (b t h v) with (b t) = {q.shape[:2]} as in q and h a multiple of"
            f" its {groups} heads, got {v.shape}."
        )
    steps = v.shape[:3]
    if log_decay is not None and log_decay.shape not in (steps, (*steps, keys)):
        raise ValueError(
            f"{name}: log_decay must be (b t h) = {steps} or (b t h k) = {(*steps, keys)},"
            f" got {log_decay.shape}."
        )
    if beta is not None and beta.shape != steps:
        raise ValueError(f"{name}: beta must be (b t h) = {steps}, got {beta.shape}.")
    extra = "" if normalise is None else "+1"
    wanted = (batch, steps[2], keys, v.shape[-1] + (normalise is not None))
    if state is not None and state.shape != wanted:
        raise ValueError(f"{name}: state must be (b h k v{extra}) = {wanted}, got {state.shape}.")
    if reset is not None and (reset.shape != (batch, time) or reset.dtype != jnp.bool_):
        raise ValueError(
            f"{name}: reset must be bool (b t) = {(batch, time)}, got {reset.dtype} {reset.shape}."
        )
    known = log_decay is not None and not isinstance(log_decay, jax.core.Tracer)
    if known and np.any(np.asarray(log_decay) > 0):
        raise ValueError(
            f"{name}: log_decay must be <= 0, the logarithm of a decay of at most 1,"
            f" got {np.max(np.asarray(log_decay))}."
        )
    is_double = any(x.dtype == jnp.float64 for x in floats.values())
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def _outer(k: Array, v: Array) -> Array:
    """k v^T."""
    return k[..., None] * v[..., None, :]


def _outer_apart(k: Array, v: Array) -> Array:
    """The same as a product of two columns each, of which one is zero. A product of single columns
    XLA would merge with what made k and v, and make them again for every number of the state.
    """
    columns = jnp.stack([k, jnp.zeros_like(k)], axis=-1)
    rows = jnp.stack([v, jnp.zeros_like(v)], axis=-2)
    return jnp.matmul(columns, rows)


def _step(
    state: Array, now: Inputs, write: Callable[[Array, Array], Array] = _outer
) -> tuple[Array, Array]:
    """One step from S (b h k v): the next state and y (b h v)."""
    q, k, v, log_decay, beta = _widened(now, state.dtype)
    if log_decay is not None:
        state = jnp.exp(log_decay)[..., None] * state
    if beta is not None:
        v = beta * (v - _read(state, k))
    state = state + write(k, v)
    return state, _read(state, q)


def _read(state: Array, q: Array) -> Array:
    """S^T q as a product: a sum over rows takes ten times as long on CPU."""
    return jnp.matmul(q[..., None, :], state)[..., 0, :]


def _sequential(inputs: Inputs, state: Array, chunk: int) -> tuple[Array, Array]:
    """One step after the other. The gradient keeps the states between chunks, and computes those
    inside of one chunk again at a time.
    """
    time, heads = inputs.v.shape[1:3]
    q, k = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in inputs[:2])
    inputs = inputs._replace(q=q, k=k)
    if time == 1:
        with _precision(inputs):
            last, y = _step(state, jax.tree.map(lambda x: x[:, 0], inputs), write=_outer_apart)
        return y[:, None], last

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def stretch(state: Array, steps: Inputs) -> tuple[Array, Array]:
        return lax.scan(_step, state, steps)

    chunk = _whole_chunk(time, chunk)
    # (n c b h ...): a step reads one stretch of memory
    chunks = jax.tree.map(lambda x: jnp.moveaxis(x, (1, 3), (0, 1)), _to_chunks(inputs, chunk))
    with _precision(inputs):
        last, y = lax.scan(stretch, state, chunks)
    return _from_chunks(jnp.moveaxis(y, (0, 1), (1, 3)), time), last


def _widened(inputs: Inputs, dtype: Any) -> Inputs:
    return jax.tree.map(lambda x: x.astype(dtype), inputs)


def _whole_chunk(time: int, chunk: int) -> int:
    """A power of two, so that halves have halves, and no longer than it takes."""
    return 1 << (min(time, chunk) - 1).bit_length()


def _to_chunks(inputs: Inputs, chunk: int) -> Inputs:
    """(b t h ...) to (b n h c ...)."""
    return jax.tree.map(functools.partial(_cut, chunk=chunk), inputs)


def _cut(x: Array, chunk: int) -> Array:
    """(b t h ...) to (b n h c ...). The last chunk is filled with zeros, which are steps that leave
    the state as it is.
    """
    batch, time, *rest = x.shape
    chunks = -(-time // chunk)
    x = jnp.pad(x, [(0, 0), (0, chunks * chunk - time)] + [(0, 0)] * len(rest))
    return jnp.swapaxes(x.reshape(batch, chunks, chunk, *rest), 2, 3)


def _from_chunks(y: Array, time: int) -> Array:
    """(b n h c v) to (b t h v)."""
    batch, chunks, heads, chunk, width = y.shape
    return jnp.swapaxes(y, 2, 3).reshape(batch, chunks * chunk, heads, width)[:, :time]


# The chunkwise form


class _Maps(NamedTuple):
    """What every chunk does with the states S that enter it, those of a key's r heads side by side.

    y = alone + weight * reads S,   S <- decay * S - taken_out S + entering
    """

    alone: Array  # (b n h c v)
    reads: Array  # (b n g c k)
    weight: Array | None  # (b n h c 1); None: 1
    decay: Array  # (b n g 1 1) or (b n g kr 1)
    taken_out: Array | None  # (b n h k k); None under the gated rule
    entering: Array  # (b n g kr v)

    def read(self, states: Array) -> Array:
        """y (b n h c v), from the states (b n g kr v)."""
        batch, chunks, groups, steps, keys = self.reads.shape
        heads, width = self.alone.shape[2], self.alone.shape[4]
        shared = heads // groups
        y = jnp.matmul(self.reads, states.reshape(batch, chunks, groups, keys, shared * width))
        y = y.reshape(batch, chunks, groups, steps, shared, width)
        y = jnp.swapaxes(y, 3, 4).reshape(self.alone.shape)
        return self.alone + (y if self.weight is None else self.weight * y)


States = Callable[..., tuple[Array, Array]]
"""Runs the maps: `chunk_states`, or the same over several devices."""


def chunk_states(
    decay: Array, taken_out: Array | None, entering: Array, state: Array, *, reverse: bool
) -> tuple[Array, Array]:
    """The states that enter each chunk, (b n g kr v), and the last, in the direction of the run.

    Args:
      decay: see `_Maps`, as are the next two.
      taken_out: see `_Maps`.
      entering: see `_Maps`.
      state: what enters the first chunk, (b g kr v).
      reverse: the first chunk is the last in time.
    """

    def one_by_one(decay: Array, entering: Array, state: Array) -> tuple[Array, Array]:
        def step(state: Array, chunk: tuple[Array, Array, Array | None]) -> tuple[Array, Array]:
            decay, entering, taken_out = chunk
            after = decay * state
            if taken_out is not None:
                # Apart, so that what stays is not rounded with the product's precision.
                after = after - jnp.matmul(taken_out, state)
            return after + entering, state

        chunks = (decay, entering, taken_out)
        unroll = UNROLLED_CHUNKS if taken_out is None else 1
        last, before = over_time(step, state, chunks, reverse=reverse, unroll=unroll)
        return before, last

    def all_at_once(decay: Array, entering: Array, state: Array) -> tuple[Array, Array]:
        after, last = linear_scan(decay, entering, state, reverse=reverse)
        return shifted(after, state, towards_start=reverse), last

    if taken_out is not None:
        return one_by_one(decay, entering, state)
    return lax.platform_dependent(decay, entering, state, cpu=one_by_one, default=all_at_once)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _chunkwise(inputs: Inputs, state: Array, chunk: int) -> tuple[Array, Array]:
    y, last, _ = forward(inputs, state, chunk, chunk_states)
    return y, last


def _chunkwise_forward(inputs, state, chunk):  # type: ignore[no-untyped-def]
    y, last, states = kept(forward(inputs, state, chunk, chunk_states))
    return (y, last), (inputs, states)


def _chunkwise_backward(chunk, residuals, cotangents):  # type: ignore[no-untyped-def]
    (inputs, states), (dy, dlast) = residuals, cotangents
    return backward(inputs, states, dy, dlast, chunk, chunk_states)


_chunkwise.defvjp(_chunkwise_forward, _chunkwise_backward)


def forward(inputs: Inputs, state: Array, chunk: int, run: States) -> tuple[Array, Array, Array]:
    """y (b t h v), the last state, and the states that enter each chunk (b n g kr v).

    Args:
      inputs: of all steps.
      state: S before the first step.
      chunk: see `matrix_scan`.
      run: runs the maps of the chunks.
    """
    with _precision(inputs):
        maps = _maps(inputs, chunk, state.dtype)
        state = _side_by_side(state, inputs.k.shape[2])
        states, last = run(maps.decay, maps.taken_out, maps.entering, state, reverse=False)
        y = maps.read(states)
    return _from_chunks(y, inputs.q.shape[1]), _apart(last, inputs.v.shape[2]), states


def backward(
    inputs: Inputs, states: Array, dy: Array, dlast: Array, chunk: int, run: States
) -> tuple[Inputs, Array]:
    """The gradient to the inputs and to the state before the first step; see `forward`."""
    with _precision(inputs):
        maps, from_maps = jax.vjp(lambda inputs: _maps(inputs, chunk, states.dtype), inputs)
        _, from_read = jax.vjp(_Maps.read, maps, states)
        dmaps, read = from_read(_cut(dy, maps.alone.shape[3]))
        taken_out = None if maps.taken_out is None else jnp.swapaxes(maps.taken_out, -1, -2)
        dlast = _side_by_side(dlast, inputs.k.shape[2])
        dstates, dstate = run(maps.decay, taken_out, read, dlast, reverse=True)
        # As a product, for which XLA on CPU takes a fraction of the time of a sum of products.
        of_rows = "k" if maps.decay.shape[-2] > 1 else ""
        ddecay = jnp.einsum(f"bngkv,bngkv->bng{of_rows}", dstates, states)
        ddecay = ddecay.reshape(maps.decay.shape)
        dmaps = dmaps._replace(decay=ddecay, entering=dstates)
        if taken_out is not None:
            dmaps = dmaps._replace(taken_out=-jnp.matmul(dstates, jnp.swapaxes(states, -1, -2)))
        (dinputs,) = from_maps(dmaps)
    return dinputs, _apart(dstate, inputs.v.shape[2])


def _side_by_side(state: Array, groups: int) -> Array:
    """(b h k v) to (b g kr v): what the r heads of a group keep under one key, in a row."""
    batch, heads, keys, width = state.shape
    shared = heads // groups
    state = state.reshape(batch, groups, shared, keys, width)
    return jnp.swapaxes(state, 2, 3).reshape(batch, groups, keys * shared, width)


def _apart(state: Array, heads: int) -> Array:
    """(b g kr v) to (b h k v)."""
    batch, groups, rows, width = state.shape
    shared = heads // groups
    state = state.reshape(batch, groups, rows // shared, shared, width)
    return jnp.swapaxes(state, 2, 3).reshape(batch, heads, rows // shared, width)


def _precision(inputs: Inputs) -> Any:
    """Products of float32 are exact to float32, which accelerators do not do by themselves; those
    of shorter numbers are as the device, or who set it up, prefers.
    """
    if all(jnp.finfo(x.dtype).bits < 32 for x in inputs[:3]):
        return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")


def _maps(inputs: Inputs, chunk: int, dtype: Any) -> _Maps:
    """The map of every chunk, in the dtype of the state."""
    chunks = _to_chunks(inputs, _whole_chunk(inputs.q.shape[1], chunk))
    q, k, v, log_decay, beta = _widened(chunks, dtype)
    sums = None if log_decay is None else running_sums(log_decay)
    within = decayed_products(q, k, sums, v.shape[2])
    decay, weight, taken_out = jnp.ones_like(k[..., :1, :1]), None, None
    keys_at_begin = keys_at_end = k
    written, values_at_end = v, v
    if sums is not None:
        since_begin, until_end = jnp.exp(sums.total()), jnp.exp(sums.row(-1).minus(sums))
        decay = _of_rows(since_begin[..., -1, :], k)
        if beta is None and until_end.shape[-1] == 1:
            weight, values_at_end = since_begin, v * until_end
        else:
            q, keys_at_begin, keys_at_end = q * since_begin, k * since_begin, k * until_end
    if beta is not None:
        # Row i of the system: what step i writes, once all before it have.
        system = jnp.tril(beta * decayed_products(k, k, sums, v.shape[2]), -1)
        solution = solve(system, beta * jnp.concatenate([v, keys_at_begin], axis=-1))
        written, missing = solution[..., : v.shape[-1]], solution[..., v.shape[-1] :]
        q = q - jnp.matmul(within, missing)
        taken_out = jnp.matmul(jnp.swapaxes(keys_at_end, -1, -2), missing)
        values_at_end = written
    entering = _written(keys_at_end, values_at_end)
    return _Maps(jnp.matmul(within, written), q, weight, decay, taken_out, entering)


def _of_rows(decay: Array, k: Array) -> Array:
    """Decays (b n h 1) or (b n h k) of each row of states (b n g kr v) with keys (b n g c k)."""
    batch, chunks, groups, _, keys = k.shape
    heads, each = decay.shape[2:]
    decay = decay.reshape(batch, chunks, groups, heads // groups, each)
    decay = jnp.broadcast_to(decay, (*decay.shape[:4], keys))
    return jnp.swapaxes(decay, 3, 4).reshape(batch, chunks, groups, keys * heads // groups, 1)


def _written(k: Array, v: Array) -> Array:
    """k^T v of all steps, (b n g kr v), from keys (b n g c k) and values (b n h c v)."""
    batch, chunks, groups, steps, keys = k.shape
    shared, width = v.shape[2] // groups, v.shape[4]
    values = jnp.swapaxes(v.reshape(batch, chunks, groups, shared, steps, width), 3, 4)
    values = values.reshape(batch, chunks, groups, steps, shared * width)
    entering = jnp.matmul(jnp.swapaxes(k, -1, -2), values)
    return entering.reshape(batch, chunks, groups, keys * shared, width)
