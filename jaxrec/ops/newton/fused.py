"""`newton_scan` by its kernel: what is said of a step for each channel, and windows one by one.

State, parameters and inputs are taken apart into rows of channels. What has as many numbers in its
last axis as the state belongs to channels one by one, the rest is the same for all.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrec.ops.newton import kernel
from jaxrec.ops.newton.channelwise import NotChannelwiseError, Tiles, channelwise, tiles
from jaxrec.ops.newton.kernel import Cell, Job
from jaxrec.ops.newton.plan import Floats, NewtonInfo, Others, Plan, windowed
from jaxrec.ops.newton.structure import DISAGREEMENT
from jaxrec.ops.time.block import LARGEST_UNROLLED

DEFAULT_WINDOW = 2048  # steps: a program's inputs then fit into a TPU's vector memory


class _Leaf(NamedTuple):
    """An array of params or of one step's x, without the axes of batch and time."""

    shape: tuple[int, ...]
    dtype: Any
    is_of_channels: bool

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1] if self.is_of_channels else self.shape)

    @property
    def of_one_channel(self) -> tuple[int, ...]:
        return (*self.shape[:-1], 1) if self.is_of_channels else self.shape


def cell(plan: Plan, params: Any, x: Any, h0: Array) -> Cell:
    """The step of a plan as arithmetic between tiles.

    Args:
      plan: of the call.
      params: of the step.
      x: (b t ...).
      h0: (b ...).

    Raises:
      ValueError: the kernel cannot run it, and why.
    """
    kind, shape = plan.structure.kind, h0.shape[1:]
    if not shape or math.prod(shape[:-1]) > LARGEST_UNROLLED or kind == "dense":
        raise ValueError(
            'newton_scan: method="pallas" needs a state (b d), or (b m d) with m <='
            f" {LARGEST_UNROLLED}, whose d channels do not mix in a step; got a {kind} Jacobian and"
            f' a state {h0.shape}. Say method="newton".'
        )
    if h0.dtype != jnp.float32:
        raise ValueError(f'newton_scan: method="pallas" computes in float32, got {h0.dtype}.')
    wrong = [
        z.dtype for z in jax.tree.leaves((params, x)) if not jnp.issubdtype(z.dtype, jnp.floating)
    ]
    if wrong:
        raise ValueError(
            f'newton_scan: method="pallas" takes params and x of floats, got {wrong[0]}.'
        )
    of_params = _leaves(params, shape[-1], axes=0)
    of_x = _leaves(x, shape[-1], axes=2)
    try:
        return _traced(plan, params, x, shape, of_params, of_x)
    except (NotChannelwiseError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            'newton_scan: method="pallas" needs a step that runs for one channel alone, where'
            f" every last axis of {shape[-1]} numbers becomes one of 1, and closes over no such"
            f" array; it does not: {error}. Give what belongs to channels as params or x with the"
            ' channel last, or say method="newton".'
        ) from error


def _leaves(tree: Any, channels: int, axes: int) -> list[_Leaf]:
    shapes = [(leaf.shape[axes:], leaf.dtype) for leaf in jax.tree.leaves(tree)]
    return [_Leaf(s, dtype, bool(s) and s[-1] == channels) for s, dtype in shapes]


def _traced(
    plan: Plan,
    params: Any,
    x: Any,
    shape: tuple[int, ...],
    of_params: list[_Leaf],
    of_x: list[_Leaf],
) -> Cell:
    one_state, size = (1, *shape[:-1], 1), math.prod(shape[:-1])

    def of_one(leaves: list[_Leaf], tree: Any, *batch: int) -> Any:
        found = [
            jax.ShapeDtypeStruct((*batch, *leaf.of_one_channel), leaf.dtype) for leaf in leaves
        ]
        return jax.tree.unflatten(jax.tree.structure(tree), found)

    def value_and_jacobian(params: Any, h: Array, x: Any) -> tuple[Array, ...]:
        """The new state, and its derivative by each of its numbers."""
        if plan.analytic is not None:
            matrix = plan.analytic(params, h, x).reshape(size, size)
            columns = [matrix[:, j].reshape(one_state) for j in range(size)]
            return plan.step(params, h, x), *columns
        value, linear = jax.linearize(lambda h: plan.step(params, h, x), h)
        basis = np.eye(size, dtype=h.dtype).reshape(size, *one_state)
        return value, *(linear(basis[j]) for j in range(size))

    state = jax.ShapeDtypeStruct(one_state, jnp.float32)
    arguments = (of_one(of_params, params), state, of_one(of_x, x, 1))
    traced = [jax.make_jaxpr(f)(*arguments) for f in (plan.step, value_and_jacobian)]
    if traced[0].out_avals[0].shape != one_state:
        raise NotChannelwiseError(
            f"a state {one_state} becomes one of {traced[0].out_avals[0].shape}"
        )
    if any(isinstance(z, jax.core.Tracer) for one in traced for z in one.consts):
        raise NotChannelwiseError("it closes over values that are being traced")
    value, both = (channelwise(one.jaxpr, one.consts) for one in traced)

    def arrays(leaves: list[_Leaf], entries: list[Array], *batch: int) -> list[Tiles]:
        found, rest = [], list(entries)
        for leaf in leaves:
            own, rest = rest[: leaf.rows], rest[leaf.rows :]
            own = [lax.convert_element_type(z, leaf.dtype) for z in own]
            found.append(tiles(own, (*batch, *leaf.of_one_channel)))
        return found

    def run(f: Any, params: list[Array], h: list[Array], x: list[Array]) -> list[list[Array]]:
        zero = h[0] - h[0]  # a tile in the layout of the others, where the result is a number
        found = f([*arrays(of_params, params), tiles(h, one_state), *arrays(of_x, x, 1)])
        return [[z + zero if jnp.ndim(z) == 0 else z for z in out.reshape(-1)] for out in found]

    def state_and_slopes(*arguments: Any) -> tuple[list[Array], list[list[Array]]]:
        new, *columns = run(both, *arguments)
        return new, [list(row) for row in zip(*columns, strict=True)]

    return Cell(lambda *arguments: run(value, *arguments)[0], state_and_slopes)


def check(plan: Plan, params: Any, x: Any, h0: Array) -> None:
    """Compares the channels one by one with the step, along random states, params and inputs.

    Raises:
      ValueError: they disagree, or the kernel cannot run the step.
    """
    run, shape = cell(plan, params, x, h0), h0.shape
    rng = np.random.default_rng(0)
    one = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[:1] + leaf.shape[2:], leaf.dtype), x
    )

    def random(leaf: Any) -> np.ndarray:
        return (0.5 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    def both(params: Any, h: Array, one: Any) -> tuple[Array, Array]:
        with_time = jax.tree.map(lambda leaf: leaf[:, None], one)
        rows = _rows(with_time, shape[-1], 2, h.dtype)[:, 0]
        own = _rows(params, shape[-1], 0, h.dtype)
        states = h.reshape(shape[0], -1, shape[-1])
        tiles = [jnp.broadcast_to(row, states[:, 0].shape) for row in own]
        new = run.value(tiles, list(jnp.moveaxis(states, 1, 0)), list(jnp.moveaxis(rows, 1, 0)))
        return plan.step(params, h, one), jnp.stack(new, axis=1).reshape(shape)

    with jax.ensure_compile_time_eval():
        arguments = jax.tree.map(random, (params, h0, one))
        want, got = (np.asarray(z) for z in jax.jit(both)(*arguments))
    if not np.max(np.abs(got - want)) <= DISAGREEMENT * max(1.0, np.max(np.abs(want))):
        raise ValueError(
            'newton_scan: method="pallas" runs channels one by one, and this step then gives'
            " another state: something in params or x has as many numbers in its last axis as the"
            ' state has channels without belonging to them. Say method="newton".'
        )


def _rows(tree: Any, channels: int, axes: int, dtype: Any) -> Array:
    """Leaves (... rows n) behind one another; `axes` come before."""
    found = []
    for leaf, of in zip(jax.tree.leaves(tree), _leaves(tree, channels, axes), strict=True):
        leading = leaf.shape[:axes]
        own = leaf.astype(dtype).reshape(*leading, of.rows, channels if of.is_of_channels else 1)
        found.append(jnp.broadcast_to(own, (*leading, of.rows, channels)))
    if not found:
        return jnp.zeros((1, channels), dtype)  # a row that nobody reads, as arrays have some size
    return jnp.concatenate(found, axis=axes)


def newton(plan: Plan, floats: Floats, others: Others, h0: Array) -> tuple[Array, NewtonInfo]:
    """All steps, by the kernel of the platform: Mosaic GPU, Mosaic TPU, or interpreted on CPU."""
    run = functools.partial(_windows, plan)
    return lax.platform_dependent(
        floats,
        others,
        h0,
        cpu=functools.partial(run, platform="cpu"),
        cuda=functools.partial(run, platform="cuda"),
        tpu=functools.partial(run, platform="tpu"),
    )


def _windows(
    plan: Plan, floats: Floats, others: Others, h0: Array, *, platform: str
) -> tuple[Array, NewtonInfo]:
    params, x = plan.split.join(floats, others)
    *_, reset, guess = others
    run = cell(plan, params, x, h0)
    batch, time = jax.tree.leaves(x)[0].shape[:2]
    channels = h0.shape[-1]
    start = h0.reshape(batch, -1, channels)
    cut_up, put_together = windowed(time, plan.window)
    length = cut_up.length
    tile = kernel.tile_of(platform, batch, length, channels, plan.chunks)
    steps = -(-length // tile.chunks)
    marks = None
    if reset is not None or cut_up.windows * length > time or tile.chunks * steps > length:
        reset = jnp.zeros((batch, time), jnp.bool_) if reset is None else reset
        marks = jnp.where(reset, kernel.RESET, kernel.ONE_AFTER_ANOTHER).astype(h0.dtype)
    job = Job(run, tile, steps, 0, marks is not None, plan.rules)
    own = _rows(params, channels, 0, h0.dtype)
    own = kernel.arranged(jnp.broadcast_to(own, (1, tile.chunks, *own.shape)), tile, 1)[
        0, :, 0
    ]  # (k p c n)

    def body(carry: tuple[Array, Array], inputs: Any) -> tuple[tuple[Array, Array], Any]:
        (start, usual), (x, marks, guess, padding) = carry, inputs
        rows = _rows(x, channels, 2, h0.dtype)
        if marks is not None:
            marks = jnp.where(padding, kernel.HOLD, marks)
            rest = ((0, 0), (0, tile.chunks * steps - length))
            marks = jnp.pad(marks, rest, constant_values=kernel.HOLD)
            rows = jnp.pad(rows, (*rest, (0, 0), (0, 0)), mode="edge")
            of_all = jnp.broadcast_to(marks[:, :, None, None], (*marks.shape, 1, channels))
            rows = jnp.concatenate([rows, of_all], axis=2)
        if guess is None:
            later = jnp.broadcast_to(usual[:, None], (batch, tile.chunks - 1, *usual.shape[1:]))
        else:
            ends = np.minimum(np.arange(1, tile.chunks) * steps, length) - 1
            later = guess[:, ends].reshape(batch, tile.chunks - 1, *usual.shape[1:])
        entering = jnp.concatenate([start[:, None], later], axis=1)
        h, ended = kernel.run(
            job._replace(rows=rows.shape[2]),
            own,
            kernel.arranged(rows, tile, steps),
            kernel.arranged(entering, tile, 1)[:, :, 0],
            platform=platform,
        )
        h = kernel.put_back(h, length, channels)
        ended = jnp.max(ended, axis=(0, 1, 3, 4))
        usual = jnp.mean(h, axis=1)
        usual = jnp.where(jnp.isfinite(usual), usual, jnp.zeros((), h.dtype))
        return (h[:, -1], usual), (h, ended)

    inputs = (cut_up((x, marks, guess)), cut_up.padding())
    (x, marks, guess), padding = inputs
    _, (h, ended) = lax.scan(body, (start, jnp.zeros_like(start)), (x, marks, guess, padding))
    residual, iterations, failed = jnp.moveaxis(ended, 1, 0)
    failed = failed > 0
    info = NewtonInfo(
        iterations=jnp.max(iterations).astype(jnp.int32),
        residual=jnp.max(jnp.where(residual < kernel.INFINITE, residual, jnp.inf)),
        converged=~jnp.any(failed),
        fallbacks=jnp.sum(failed, dtype=jnp.int32) if plan.rules.safeguard else jnp.int32(0),
    )
    return put_together(h).reshape(batch, time, *h0.shape[1:]), info
