"""Recurrences whose time axis is spread over devices: only carries travel.

A device holds t/S consecutive steps. Together they are one affine map of the state that enters,
h -> P h + q with P the product of its decays and q its last state from zero, so the devices

    1. find their own map,   2. exchange maps, (b ...) each,   3. run from what enters.

The gradient is the same recurrence run backwards, see `jaxrec.ops.time.scan`; P is the same there,
so that it exchanges once too. Where the state is a matrix, P multiplies it from the left: a row by
a decay, or by a k x k matrix under the delta rule.

Martin & Cundy, Parallelizing linear recurrent neural nets over sequence length (2018),
arXiv:1709.04057, section 2.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec

from jaxrec.ops.kept import kept
from jaxrec.ops.time import matrix_chunks, scan, selective
from jaxrec.ops.time.matrix_scan import Rule, finished
from jaxrec.ops.time.matrix_scan import prepare as prepare_matrix_scan
from jaxrec.ops.time.running_max import Method as MaxMethod
from jaxrec.ops.time.running_max import prepare as prepare_max
from jaxrec.ops.time.running_max import run as run_max
from jaxrec.ops.time.scan import Method

Exchange = Literal["all_gather", "ppermute"]


def sharded_linear_scan(
    a: Array,
    b: Array,
    h0: Array | None = None,
    *,
    axis: str,
    reverse: bool = False,
    reset: Array | None = None,
    method: Method = "auto",
    exchange: Exchange = "all_gather",
) -> tuple[Array, Array]:
    """`linear_scan` over the devices of one axis of the current mesh (`jax.set_mesh`).

    Args:
      a: as in `linear_scan`.
      b: as in `linear_scan`.
      h0: as in `linear_scan`, on every device of the axis.
      axis: name of the mesh axis over which time is spread; its size S divides t.
      reverse: as in `linear_scan`.
      reset: as in `linear_scan`.
      method: how each device runs its own steps.
      exchange: "all_gather" sends every map to every device at once, S (2 b ...) values received by
        each, twice as many where the mesh has other axes (see `from_all`); "ppermute" composes
        neighbours' maps in log2(S) rounds of (2 b ...) values, and tells the last state by a sum.

    Returns:
      h, spread over the axis as b is, and the last state on every device of it.

    Raises:
      ValueError: as `linear_scan`; or there is no mesh with such an axis, S does not divide t, or
        the exchange is unknown.
    """
    a, b, h0 = scan.prepare(a, b, h0, reset, method)
    _check("sharded_linear_scan", b.shape[1], axis, exchange)
    return _scan(a, b, h0, axis, reverse, method, exchange)


def sharded_selective_scan(
    x: Array,
    dt: Array,
    a: Array,
    b: Array,
    c: Array,
    state: Array | None = None,
    *,
    axis: str,
    reset: Array | None = None,
    chunk: int = 32,
    method: selective.Method = "auto",
    exchange: Exchange = "all_gather",
) -> tuple[Array, Array]:
    """`selective_scan` over the devices of one axis of the current mesh (`jax.set_mesh`).

    Arguments and results are those of `selective_scan`, time spread over `axis`; `axis` and
    `exchange` are those of `sharded_linear_scan`. A map is a pair of states, (2 b e n).

    Raises:
      ValueError: as `selective_scan` and `sharded_linear_scan`.
    """
    _check("sharded_selective_scan", x.shape[1], axis, exchange)
    if state is None:
        state = jnp.zeros((x.shape[0], *a.shape), jnp.float32)
    if reset is None:
        reset = jnp.zeros(x.shape[:2], jnp.bool_)

    def run(x, dt, a, b, c, state, reset):  # type: ignore[no-untyped-def]
        step = functools.partial(
            selective.selective_scan, x, dt, a, b, c, reset=reset, chunk=chunk, method=method
        )
        total = jnp.sum(dt.astype(state.dtype), axis=1)[..., None] * a.astype(state.dtype)[None]
        cut = jnp.any(reset, axis=1)[:, None, None]
        product = jnp.where(cut, jnp.zeros((), state.dtype), jnp.exp(total))
        _, alone = step(jnp.zeros_like(state))
        maps = jnp.stack([product, alone])
        entering, last = _exchange(_BY_ELEMENT, maps, state, axis, exchange, reverse=False)
        return step(entering)[0], last

    over_time, everywhere, _ = _places(axis)
    places = (over_time, over_time, everywhere, over_time, over_time, everywhere, over_time)
    return on_devices(run, axis, places, (over_time, everywhere))(x, dt, a, b, c, state, reset)


def sharded_running_max(
    log_decay: Array,
    x: Array,
    m0: Array | None = None,
    *,
    axis: str,
    reset: Array | None = None,
    method: MaxMethod = "auto",
) -> tuple[Array, Array]:
    """`running_max` over the devices of one axis of the current mesh (`jax.set_mesh`).

    Arguments and results are those of `running_max`, time spread over `axis`. A device's map of
    what enters, m -> max(p + m, q), is sent to every device at once, (2 b ...) values for each.

    Raises:
      ValueError: as `running_max` and `sharded_linear_scan`.
    """
    log_decay, x, m0 = prepare_max(log_decay, x, m0, reset, method)
    _check("sharded_running_max", x.shape[1], axis, "all_gather")

    def run(log_decay: Array, x: Array, m0: Array) -> tuple[Array, Array]:
        _, alone = run_max(log_decay, x, jnp.full_like(m0, -jnp.inf), method)
        every = from_all(jnp.stack([jnp.sum(log_decay, axis=1), alone]), axis)

        def step(m: Array, one: Array) -> tuple[Array, Array]:
            return jnp.maximum(one[0] + m, one[1]), m

        last, entering = lax.scan(step, m0, every)
        rank = lax.axis_index(axis)
        enters = lax.dynamic_index_in_dim(entering, rank, keepdims=False)
        return run_max(log_decay, x, enters, method)[0], last

    over_time, everywhere, _ = _places(axis)
    places = (over_time, over_time, everywhere)
    return on_devices(run, axis, places, (over_time, everywhere))(log_decay, x, m0)


def sharded_matrix_scan(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None = None,
    state: Array | None = None,
    *,
    axis: str,
    beta: Array | None = None,
    rule: Rule = "gated",
    normalise: float | None = None,
    reset: Array | None = None,
    chunk: int = 64,
    exchange: Exchange = "all_gather",
) -> tuple[Array, Array]:
    """`matrix_scan` over the devices of one axis of the current mesh (`jax.set_mesh`).

    Arguments and results are those of `matrix_scan`, time spread over `axis`; `axis` and `exchange`
    are those of `sharded_linear_scan`. Every device works by chunks. A map is a state and a decay
    of its rows, (b h k 1+v), and under the delta rule a state and a transition, (b h k k+v).

    Raises:
      ValueError: as `matrix_scan` and `sharded_linear_scan`.
    """
    name = "sharded_matrix_scan"
    inputs, state = prepare_matrix_scan(
        name, q, k, v, log_decay, state, beta, rule, normalise, reset, chunk
    )
    _check(name, q.shape[1], axis, exchange)
    y, last = _matrix_scan(inputs, state, axis, chunk, exchange)
    return finished(y, normalise, v.dtype), last


def _check(name: str, time: int, axis: str, exchange: str) -> None:
    if exchange not in get_args(Exchange):
        raise ValueError(f"{name}: exchange must be one of {get_args(Exchange)}, got {exchange!r}.")
    size = jax.sharding.get_abstract_mesh().shape.get(axis)
    if size is None:
        raise ValueError(f"{name}: the current mesh has no axis {axis!r}; set one by jax.set_mesh.")
    if time % size:
        raise ValueError(f"{name}: {time} steps do not divide over {axis}={size} devices.")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _scan(
    a: Array, b: Array, h0: Array, axis: str, reverse: bool, method: Method, exchange: Exchange
) -> tuple[Array, Array]:
    (h, last), _ = _forward(a, b, h0, axis, reverse, method, exchange)
    return h, last


def _forward(a, b, h0, axis, reverse, method, exchange):  # type: ignore[no-untyped-def]
    def run(a: Array, b: Array, h0: Array) -> tuple[Array, ...]:
        product = jnp.prod(a.astype(h0.dtype), axis=1)
        _, alone = scan.run(a, b, jnp.zeros_like(h0), reverse, method)
        maps = jnp.stack([product, alone])
        entering, last = _exchange(_BY_ELEMENT, maps, h0, axis, exchange, reverse=reverse)
        h, _ = scan.run(a, b, entering, reverse, method)
        return h, last, entering[None], product[None]

    over_time, everywhere, per_device = _places(axis)
    mapped = on_devices(
        run, axis, (over_time, over_time, everywhere), (over_time, everywhere, *[per_device] * 2)
    )
    h, last, entering, product = kept(mapped(a, b, h0))
    return (h, last), (a, h, entering, product)


def _backward(axis, reverse, method, exchange, residuals, cotangents):  # type: ignore[no-untyped-def]
    def run(a: Array, h: Array, entering: Array, product: Array, dh: Array, dlast: Array):  # type: ignore[no-untyped-def]
        _, alone = scan.run_adjoint(a, dh, jnp.zeros_like(dlast), reverse, method)
        maps = jnp.stack([product[0], alone])
        arriving, dh0 = _exchange(_BY_ELEMENT, maps, dlast, axis, exchange, reverse=not reverse)
        db, _ = scan.run_adjoint(a, dh, arriving, reverse, method)
        h_before = scan.shifted(h, entering[0].astype(h.dtype), towards_start=reverse)
        return db * h_before, db, dh0

    over_time, everywhere, per_device = _places(axis)
    places = (over_time, over_time, per_device, per_device, over_time, everywhere)
    return on_devices(run, axis, places, (over_time, over_time, everywhere))(
        *residuals, *cotangents
    )


_scan.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _matrix_scan(
    inputs: matrix_chunks.Inputs, state: Array, axis: str, chunk: int, exchange: Exchange
) -> tuple[Array, Array]:
    (y, last), _ = _matrix_forward(inputs, state, axis, chunk, exchange)
    return y, last


def _matrix_forward(inputs, state, axis, chunk, exchange):  # type: ignore[no-untyped-def]
    def run(inputs: matrix_chunks.Inputs, state: Array) -> tuple[Array, Array, Array]:
        return matrix_chunks.forward(
            inputs, state, chunk, functools.partial(_matrix_states, axis=axis, exchange=exchange)
        )

    over_time, everywhere, _ = _places(axis)
    places = (over_time, everywhere), (over_time, everywhere, over_time)
    y, last, states = kept(on_devices(run, axis, *places)(inputs, state))
    return (y, last), (inputs, states)


def _matrix_backward(axis, chunk, exchange, residuals, cotangents):  # type: ignore[no-untyped-def]
    def run(inputs: matrix_chunks.Inputs, states: Array, dy: Array, dlast: Array) -> Any:
        return matrix_chunks.backward(
            inputs,
            states,
            dy,
            dlast,
            chunk,
            functools.partial(_matrix_states, axis=axis, exchange=exchange),
        )

    over_time, everywhere, _ = _places(axis)
    places = (over_time, over_time, over_time, everywhere), (over_time, everywhere)
    return on_devices(run, axis, *places)(*residuals, *cotangents)


_matrix_scan.defvjp(_matrix_forward, _matrix_backward)


def _matrix_states(
    decay: Array,
    taken_out: Array | None,
    entering: Array,
    state: Array,
    *,
    reverse: bool,
    axis: str,
    exchange: Exchange,
) -> tuple[Array, Array]:
    """`chunk_states` where a device holds some of the chunks."""
    run = functools.partial(matrix_chunks.chunk_states, decay, taken_out, reverse=reverse)
    if taken_out is None:
        total = jnp.broadcast_to(jnp.prod(decay, axis=1), (*state.shape[:-1], 1))
        _, alone = run(entering, jnp.zeros_like(state))
        maps, kind = jnp.concatenate([total, alone], axis=-1), _BY_ROW
    else:
        # What the chunks do to the identity is their product.
        identity = jnp.broadcast_to(
            jnp.eye(state.shape[-2], dtype=state.dtype), decay.shape[:1] + taken_out.shape[2:]
        )
        nothing = jnp.zeros_like(taken_out)
        _, maps = run(
            jnp.concatenate([nothing, entering], axis=-1),
            jnp.concatenate([identity, jnp.zeros_like(state)], axis=-1),
        )
        kind = _BY_MATRIX
    arriving, last = _exchange(kind, maps, state, axis, exchange, reverse=reverse)
    return run(entering, arriving)[0], last


def _places(axis: str) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """Over time; on every device of the axis; one per device, along a new leading axis."""
    return PartitionSpec(None, axis), PartitionSpec(), PartitionSpec(axis)


def on_devices(
    run: Callable[..., Any], axis: str, in_specs: tuple[Any, ...], out_specs: tuple[Any, ...]
) -> Callable[..., Any]:
    """`run` on each device's part; axes of the mesh other than `axis` are left to the compiler."""
    mapped = jax.shard_map(
        run, in_specs=in_specs, out_specs=out_specs, axis_names={axis}, check_vma=False
    )
    return jax.jit(mapped)  # only a compiled shard_map may leave axes to the compiler


def from_all(x: Array, axis: str) -> Array:
    """What every device of a mesh axis holds, along a new leading axis; x is a number, not a bool.

    Where other axes of the mesh are left to the compiler, it is a sum in which each device fills
    its own place: for a gather XLA first undoes their split, and every device would be sent the
    maps of all rows.
    """
    mesh, size = jax.sharding.get_abstract_mesh(), lax.axis_size(axis)
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    is_alone = all(
        mesh.shape[name] == 1 or kind != AxisType.Auto
        for name, kind in kinds.items()
        if name != axis
    )
    if is_alone:
        return lax.all_gather(x, axis)
    is_own = jnp.arange(size, dtype=jnp.int32) == lax.axis_index(axis)
    is_own = is_own.reshape(size, *[1] * x.ndim)
    return lax.psum(jnp.where(is_own, x[None], jnp.zeros((), x.dtype)), axis)


class _Kind(NamedTuple):
    """How maps x -> P x + q are kept in one array, and what P x is."""

    apart: Callable[[Array, Array], tuple[Array, Array]]  # map, state -> P, q
    together: Callable[[Array, Array], Array]  # P, q -> map
    product: Callable[[Array, Array], Array]  # P, x -> P x

    def apply(self, one: Array, state: Array) -> Array:
        """P x + q."""
        p, q = self.apart(one, state)
        return self.product(p, state) + q

    def after(self, later: Array, earlier: Array, state: Array) -> Array:
        """The map of `earlier` followed by that of `later`."""
        p, q = self.apart(earlier, state)
        return self.together(self.product(self.apart(later, state)[0], p), self.apply(later, q))


def _columns(one: Array, state: Array) -> tuple[Array, Array]:
    width = one.shape[-1] - state.shape[-1]
    return one[..., :width], one[..., width:]


def _side_by_side(p: Array, q: Array) -> Array:
    return jnp.concatenate([p, q], axis=-1)


_BY_ELEMENT = _Kind(
    lambda one, state: (one[0], one[1]), lambda p, q: jnp.stack([p, q]), jnp.multiply
)
_BY_ROW = _Kind(_columns, _side_by_side, jnp.multiply)
_BY_MATRIX = _Kind(_columns, _side_by_side, functools.partial(jnp.matmul, precision="highest"))


def _exchange(
    kind: _Kind, maps: Array, start: Array, axis: str, exchange: Exchange, *, reverse: bool
) -> tuple[Array, Array]:
    """The state that enters this device, and the one that leaves the last of them.

    Args:
      kind: of the maps.
      maps: this device's map.
      start: state that enters the first device.
      axis: mesh axis.
      exchange: see `sharded_linear_scan`.
      reverse: the first device is the one with the largest index.
    """
    size = lax.axis_size(axis)
    rank = size - 1 - lax.axis_index(axis) if reverse else lax.axis_index(axis)
    if exchange == "all_gather":
        every = from_all(maps, axis)
        every = jnp.flip(every, 0) if reverse else every

        def step(state: Array, one: Array) -> tuple[Array, Array]:
            return kind.apply(one, state), state

        last, entering = lax.scan(step, start, every)
        return lax.dynamic_index_in_dim(entering, rank, keepdims=False), last

    def from_before(x: Array, distance: int) -> Array:
        """What the device `distance` ranks before holds; zeros where there is none."""
        pairs = [(i, i + distance) for i in range(size - distance)]
        return lax.ppermute(x, axis, [(j, i) for i, j in pairs] if reverse else pairs)

    distance = 1
    while distance < size:  # each round doubles how many devices a map stands for
        composed = kind.after(maps, from_before(maps, distance), start)
        maps = jnp.where(rank >= distance, composed, maps)
        distance *= 2
    leaving = kind.apply(maps, start)
    entering = jnp.where(rank == 0, start, from_before(leaving, 1))
    return entering, lax.psum(jnp.where(rank == size - 1, leaving, jnp.zeros_like(leaving)), axis)
