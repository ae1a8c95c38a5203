"""The chunkwise form of the recurrence whose state is a matrix, `ops.time.matrix_scan`.

A chunk of time is an affine map of the state S that enters it. With b_i the sum of g_1 .. g_i,
A_ij = (q_i e^{b_i - b_j}) . k_j for i >= j, and a weight e^{b_i} on row i of Q,

    gated   y = A V + (Q e^b) S,                      S <- e^{b_C} S + (K e^{b_C - b})^T V
    delta   (I + strictly lower(beta A_kk)) [U W] = beta [V  (K e^b)],   the same with V = U - W S,

where A_kk is A of keys with keys. All chunks find their maps at once, the maps run one after the
other, and then all chunks read at once. The gradient is written by hand: the same maps, transposed,
run from the last to the first, and what is inside the chunks is computed again. Heads that share
their keys have their states side by side, (k, r v) for r heads: Q K^T is found once, and one wide
product writes or reads all of them.

Yang et al. (2023), arXiv:2312.06635, section 4; Yang et al. (2024), arXiv:2406.06484, section 3.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops.kept import kept
from jaxrec.ops.time.chunk import decayed_products, running_sums, solve
from jaxrec.ops.time.loop import over_time
from jaxrec.ops.time.scan import linear_scan, shifted

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
def chunkwise(inputs: Inputs, state: Array, chunk: int) -> tuple[Array, Array]:
    """y (b t h v) and the last state, from the state S (b h k v) before the first step."""
    y, last, _ = forward(inputs, state, chunk, chunk_states)
    return y, last


def _chunkwise_forward(inputs, state, chunk):  # type: ignore[no-untyped-def]
    y, last, states = kept(forward(inputs, state, chunk, chunk_states))
    return (y, last), (inputs, states)


def _chunkwise_backward(chunk, residuals, cotangents):  # type: ignore[no-untyped-def]
    (inputs, states), (dy, dlast) = residuals, cotangents
    return backward(inputs, states, dy, dlast, chunk, chunk_states)


chunkwise.defvjp(_chunkwise_forward, _chunkwise_backward)


def forward(inputs: Inputs, state: Array, chunk: int, run: States) -> tuple[Array, Array, Array]:
    """y (b t h v), the last state, and the states that enter each chunk (b n g kr v).

    Args:
      inputs: of all steps.
      state: S before the first step.
      chunk: see `matrix_scan`.
      run: runs the maps of the chunks.
    """
    with precision(inputs):
        maps = _maps(inputs, chunk, state.dtype)
        state = _side_by_side(state, inputs.k.shape[2])
        states, last = run(maps.decay, maps.taken_out, maps.entering, state, reverse=False)
        y = maps.read(states)
    return from_chunks(y, inputs.q.shape[1]), _apart(last, inputs.v.shape[2]), states


def backward(
    inputs: Inputs, states: Array, dy: Array, dlast: Array, chunk: int, run: States
) -> tuple[Inputs, Array]:
    """The gradient to the inputs and to the state before the first step; see `forward`."""
    with precision(inputs):
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


def precision(inputs: Inputs) -> Any:
    """Products of float32 are exact to float32, which accelerators do not do by themselves; those
    of shorter numbers are as the device, or who set it up, prefers.
    """
    if all(jnp.finfo(x.dtype).bits < 32 for x in inputs[:3]):
        return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")


def _maps(inputs: Inputs, chunk: int, dtype: Any) -> _Maps:
    """The map of every chunk, in the dtype of the state."""
    chunks = to_chunks(inputs, whole_chunk(inputs.q.shape[1], chunk))
    q, k, v, log_decay, beta = widened(chunks, dtype)
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


def widened(inputs: Inputs, dtype: Any) -> Inputs:
    """All of them in the dtype of the state."""
    return jax.tree.map(lambda x: x.astype(dtype), inputs)


def whole_chunk(time: int, chunk: int) -> int:
    """A power of two, so that halves have halves, and no longer than it takes."""
    return 1 << (min(time, chunk) - 1).bit_length()


def to_chunks(inputs: Inputs, chunk: int) -> Inputs:
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


def from_chunks(y: Array, time: int) -> Array:
    """(b n h c v) to (b t h v)."""
    batch, chunks, heads, chunk, width = y.shape
    return jnp.swapaxes(y, 2, 3).reshape(batch, chunks * chunk, heads, width)[:, :time]
