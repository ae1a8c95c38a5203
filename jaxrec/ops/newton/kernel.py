"""The kernel of `newton_scan`: one program runs a few channels of a sequence, all its chunks.

A program holds one tile (c n): the state of n channels at the same step of each of c chunks of
time. It sweeps over the steps of a chunk, all chunks at once, with the cell itself, and keeps the
product of its derivatives:

    e_c = F_c(s_c),   P_c = dF_c/ds,   F_c the l steps of chunk c one after another

The unknowns are the states s_c that enter the chunks alone. Newton's method on s_{c+1} = F_c(s_c)
is the linear recurrence d_{c+1} = P_c d_c + e_c - s_{c+1} over chunks, solved by doubling in
log2 c exchanges, and then the next sweep. Within a chunk nothing is approximated; after k sweeps
the first k chunks are exact whatever the derivatives are, so that c plain sweeps (P = 0) are what
the loop does in place of a fallback. A single chunk is the recurrence itself, in one kernel.

Inputs are read once a sweep and nothing but the states is written. The cell is that of the caller,
as arithmetic between tiles (`channelwise`).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.custom_partitioning import custom_partitioning

from jaxrec.ops.newton.iteration import LARGEST_STATE, Rules

INFINITE = 1e30
"""Residuals that are not finite, inside of the kernel."""
ONE_AFTER_ANOTHER, RESET, HOLD = 0.0, 1.0, 2.0
"""What a step does: goes on, begins at zero, or leaves the state as it is."""

Tiles = list[Array]


class Cell(NamedTuple):
    """A step as arithmetic between tiles of params, state and x."""

    value: Callable[[Tiles, Tiles, Tiles], Tiles]
    value_and_jacobian: Callable[[Tiles, Tiles, Tiles], tuple[Tiles, list[Tiles]]]


class Tile(NamedTuple):
    """What a program holds at one time."""

    chunks: int
    channels: int


class Job(NamedTuple):
    """What is known when tracing."""

    cell: Cell  # tiles of params, state and x to those of the next state
    tile: Tile
    length: int  # steps of a chunk
    rows: int  # of x
    has_marks: bool  # whether the last row of x says what a step does
    rules: Rules


class Ended(NamedTuple):
    """Of each program."""

    h: Array  # (b t m n)
    residual: Array  # the largest that the iteration left
    iterations: Array
    failed: Array  # bool: plain sweeps had to do the rest


def body(job: Job, refs: "Refs") -> None:
    """One program.

    Args:
      job: what to do.
      refs: what to read and to write.
    """
    (chunks, _), rules, states = job.tile, job.rules, range(refs.entering.shape[0])
    follows = refs.follows[...]
    zero = follows - follows
    params = [refs.params[i] for i in range(refs.params.shape[0])]

    def inputs(step: Any) -> Tiles:
        return [refs.x[step, i] for i in range(job.rows)]

    def sweep(with_slopes: bool) -> tuple[Tiles, list[Tiles]]:
        def step(i: Any, carry: Any) -> Any:
            h, slopes, x = carry
            later = inputs(jnp.minimum(i + 1, job.length - 1))  # asked for before it is needed
            new, jacobian = _stepped(job, params, h, x, zero, with_slopes)
            for k in states:
                refs.h[i, k] = new[k]
            return new, _product(jacobian, slopes) if with_slopes else [], later

        identity = [[zero + float(i == j) for j in states] for i in states]
        start = ([refs.state[i] for i in states], identity if with_slopes else [], inputs(0))
        ends, slopes, _ = lax.fori_loop(0, job.length, step, start)
        return ends, slopes

    for i in states:
        refs.state[i] = refs.entering[i]
    if chunks == 1:
        sweep(False)
        for i in range(3):
            refs.ended[i] = zero
        return

    for i in range(refs.moved.shape[0]):
        refs.moved[i, _rows(0, chunks)] = zero

    def moved(x: Tiles, by: int) -> Tiles:
        """Tiles so many chunks later, zero at the beginning."""
        for i, one in enumerate(x):
            refs.moved[i, _rows(chunks, chunks)] = one
        return [refs.moved[i, _rows(chunks - by, chunks)] for i in range(len(x))]

    def improve(carry: Any) -> Any:
        sweeps, _, left = carry
        ends, slopes = sweep(True)
        h = [refs.state[i] for i in states]
        arrived = moved([*ends, *(p for row in slopes for p in row)], 1)
        arrived, flat = arrived[: len(ends)], arrived[len(ends) :]
        r = [jnp.where(follows > 0, a - b, zero) for a, b in zip(arrived, h, strict=True)]
        size = functools.reduce(jnp.maximum, map(jnp.abs, arrived), zero + 1.0)
        miss = functools.reduce(jnp.maximum, map(jnp.abs, r))
        miss = _within(miss / size, INFINITE, zero + INFINITE)
        worst, settled = jnp.max(miss), miss <= rules.tol
        d = [jnp.where(settled, zero, _within(x, INFINITE, zero)) for x in r]
        flat = [_within(p, LARGEST_STATE, zero) for p in flat]
        d = _doubled(d, _matrix(flat), moved, chunks)
        is_newton = (zero + jnp.where(sweeps < rules.max_iters, 1.0, 0.0)) > 0.5
        for i in states:
            guided = _within(h[i] + rules.relaxation * d[i], LARGEST_STATE, refs.entering[i])
            plain = jnp.where(settled, h[i], jnp.where(follows > 0, arrived[i], h[i]))
            refs.state[i] = jnp.where(is_newton, guided, plain)
        left = jnp.where(sweeps <= rules.max_iters, worst, left)
        return sweeps + 1, worst, left

    sweeps_at_most = rules.max_iters + 1 + (chunks if rules.safeguard else 0)

    def busy(carry: Any) -> Array:
        sweeps, worst, _ = carry
        return (worst > rules.tol) & (sweeps < sweeps_at_most)

    start = (jnp.int32(0), jnp.float32(INFINITE), jnp.float32(INFINITE))
    sweeps, _, left = lax.while_loop(busy, improve, start)
    refs.ended[0] = zero + left
    refs.ended[1] = zero + jnp.minimum(sweeps - 1, rules.max_iters).astype(jnp.float32)
    refs.ended[2] = zero + jnp.where(left > rules.tol, 1.0, 0.0)


class Refs(NamedTuple):
    """What a program sees: tiles (c n) behind whatever axes, m the numbers of a state."""

    params: Any  # (p c n)
    follows: Any  # (c n): 1 where a chunk has one before it
    x: Any  # (l r c n)
    entering: Any  # (m c n): where the iteration begins; exact for the first chunk
    h: Any  # (l m c n): written
    ended: Any  # (3 c n): residual, iterations, whether it failed; written
    state: Any  # (m c n): what enters each chunk, its own memory
    moved: Any  # (m + m m, 2 c, n): its own memory


def _rows(begin: int, size: int) -> Any:
    from jax.experimental import pallas

    return pallas.ds(begin, size)


def _within(x: Array, limit: float, otherwise: Array) -> Array:
    """x where it is a number within the limit."""
    return jnp.where(jnp.abs(x) <= limit, x, otherwise)


def _stepped(
    job: Job, params: Tiles, h: Tiles, x: Tiles, zero: Array, with_slopes: bool
) -> tuple[Tiles, list[Tiles]]:
    """The next state, and its derivatives: row i, column j for m numbers."""
    begin, rows = h, x
    jacobian: list[Tiles] = []
    if job.has_marks:
        *rows, mark = x
        begin = [jnp.where(mark == RESET, zero, one) for one in h]
    if not with_slopes:
        new = job.cell.value(params, begin, rows)
    else:
        new, jacobian = job.cell.value_and_jacobian(params, begin, rows)
        jacobian = _clipped(jacobian, job.rules.clip, zero)
    if job.has_marks:
        new = [jnp.where(mark == HOLD, a, b) for a, b in zip(h, new, strict=True)]
        for i, row in enumerate(jacobian):
            for j, p in enumerate(row):
                p = jnp.where(mark == RESET, zero, p)
                row[j] = jnp.where(mark == HOLD, zero + float(i == j), p)
    return new, jacobian


def _clipped(jacobian: list[Tiles], limit: float | None, zero: Array) -> list[Tiles]:
    """As `jacobian.clipped` has it."""
    if limit is None:
        return jacobian
    if len(jacobian) == 1:
        return [[jnp.clip(jacobian[0][0], -limit, limit)]]
    square = sum((jnp.square(p) for row in jacobian for p in row), start=zero)
    scale = limit * lax.rsqrt(jnp.maximum(square, limit * limit))
    return [[p * scale for p in row] for row in jacobian]


def _product(left: list[Tiles], right: list[Tiles]) -> list[Tiles]:
    """Of matrices of tiles."""
    columns = list(zip(*right, strict=True))
    return [
        [
            functools.reduce(jnp.add, (a * b for a, b in zip(row, column, strict=True)))
            for column in columns
        ]
        for row in left
    ]


def _matrix(flat: Tiles) -> list[Tiles]:
    """Rows of a square matrix from its tiles in reading order."""
    size = math.isqrt(len(flat))
    return [flat[i : i + size] for i in range(0, len(flat), size)]


def _doubled(
    d: Tiles, slopes: list[Tiles], moved: Callable[[Tiles, int], Tiles], chunks: int
) -> Tiles:
    """d_c + P_c d_{c-1} + P_c P_{c-1} d_{c-2} + ... over all chunks."""
    size, by = len(d), 1
    while by < chunks:
        before = moved([*d, *(p for row in slopes for p in row)], by)
        earlier, flat = before[:size], before[size:]
        through = _product(slopes, [[one] for one in earlier])
        d = [one + add for one, [add] in zip(d, through, strict=True)]
        slopes = _product(slopes, _matrix(flat))
        by *= 2
    return d


def run(
    job: Job, params: Array, x: Array, entering: Array, *, platform: str
) -> tuple[Array, Array]:
    """Runs the programs of one window, each where its part of x lies on a mesh.

    Args:
      job: what to do.
      params: (k p c n), k blocks of channels.
      x: (b k l r c n).
      entering: (b k m c n).
      platform: "cuda", "tpu" or "cpu", where the kernel is interpreted.

    Returns:
      The states (b k l m c n), and how each program ended, (b k 3 c n).
    """
    call = functools.partial(_run, job, platform)

    def partition(mesh: Any, arguments: Any, results: Any) -> Any:
        placed = [jax.tree.map(lambda z: z.sharding, of) for of in (results, arguments)]
        return mesh, call, *placed

    spread = custom_partitioning(call)
    spread.def_partition(
        partition,
        sharding_rule="k p c n, b k l r c n, b k m c n -> b k l m c n, b k e c n",
        need_replication_factors=("p", "c", "n", "l", "r", "m", "e"),
    )
    return spread(params, x, entering)


def _run(job: Job, platform: str, params: Array, x: Array, entering: Array) -> tuple[Array, Array]:
    from jax.experimental import pallas

    batch, blocks, length, _, *tile = x.shape
    size = entering.shape[2]
    follows = jnp.broadcast_to((jnp.arange(tile[0]) > 0).astype(x.dtype)[:, None], tile)
    out = [
        jax.ShapeDtypeStruct((batch, blocks, length, size, *tile), x.dtype),
        jax.ShapeDtypeStruct((batch, blocks, 3, *tile), x.dtype),
    ]
    own = [(size, *tile), (size + size * size, 2 * tile[0], tile[1])]
    arrays = (params, follows, x, entering)
    if platform == "tpu":
        from jax.experimental.pallas import tpu

        def block(shape: Sequence[int], *leading: int) -> Any:
            """One program's part; its axes are those that are `leading`, in this order."""
            axes = tuple(shape[len(leading) :])
            return pallas.BlockSpec(
                (*(None for _ in leading), *axes),
                lambda *at: (*(at[i] for i in leading), *(0 for _ in axes)),
            )

        return pallas.pallas_call(
            lambda *refs: body(job, Refs(*refs)),
            grid=(batch, blocks),
            in_specs=[
                block(params.shape, 1),
                block(follows.shape),
                block(x.shape, 0, 1),
                block(entering.shape, 0, 1),
            ],
            out_specs=[block(one.shape, 0, 1) for one in out],
            out_shape=out,
            scratch_shapes=[tpu.VMEM(shape, x.dtype) for shape in own],
            name="newton_scan",
        )(*arrays)
    from jax.experimental.pallas import mosaic_gpu

    def one_program(i: Any, k: Any, refs: Sequence[Any]) -> None:
        params, follows, x, entering, h, ended, *own = refs
        views = (params.at[k], follows, *(ref.at[i, k] for ref in (x, entering, h, ended)))
        body(job, Refs(*views, *own))

    scratch = [mosaic_gpu.SMEM(shape, x.dtype) for shape in own]
    if platform == "cpu":
        whole = pallas.BlockSpec(memory_space=mosaic_gpu.GMEM)
        return pallas.pallas_call(
            lambda *refs: one_program(pallas.program_id(0), pallas.program_id(1), refs),
            grid=(batch, blocks),
            in_specs=[whole] * len(arrays),
            out_specs=[whole] * len(out),
            out_shape=out,
            scratch_shapes=scratch,
            interpret=True,
            name="newton_scan",
        )(*arrays)
    return mosaic_gpu.kernel(
        lambda *refs: one_program(lax.axis_index("batch"), lax.axis_index("block"), refs),
        out_type=out,
        scratch_types=scratch,
        grid=(batch, blocks),
        grid_names=("batch", "block"),
    )(*arrays)


def arranged(x: Array, tile: Tile, length: int) -> Array:
    """(b t r n) as (b k l r c n): the last step and channel repeated where they do not divide."""
    batch, time, rows, channels = x.shape
    blocks = -(-channels // tile.channels)
    rest = (
        (0, 0),
        (0, tile.chunks * length - time),
        (0, 0),
        (0, blocks * tile.channels - channels),
    )
    if any(end for _, end in rest):
        x = jnp.pad(x, rest, mode="edge")
    x = x.reshape(batch, tile.chunks, length, rows, blocks, tile.channels)
    return jnp.transpose(x, (0, 4, 2, 3, 1, 5))


def put_back(x: Array, time: int, channels: int) -> Array:
    """(b k l r c n) as (b t r n)."""
    batch, blocks, length, rows, chunks, width = x.shape
    x = jnp.transpose(x, (0, 4, 2, 3, 1, 5))
    return x.reshape(batch, chunks * length, rows, blocks * width)[:, :time, :, :channels]


THREADS = 128  # entries of a tile on a GPU: one for each thread of a program
ENOUGH_CHANNELS = 2**14
"""Channels of all sequences from which a GPU is busy without a second chunk: there Newton's method
has no depth to save."""
ENOUGH_ENTRIES = 2**17  # of all programs together, where there are fewer channels
SHORTEST_CHUNK = 16


def tile_of(platform: str, batch: int, time: int, channels: int, chunks: int | None = None) -> Tile:
    """What a program holds if a window has so many chunks. None: by arithmetic, not by measurement.
    A step takes a GPU about as long whether few of its threads have work or all, so that chunks are
    made until all have.
    """
    if platform == "tpu":
        return Tile(chunks or 8, 128)  # 8: one vector register
    if chunks is None:
        longest = max(1, time // SHORTEST_CHUNK)
        is_busy = batch * channels >= ENOUGH_CHANNELS
        most = 1 if is_busy else min(ENOUGH_ENTRIES // (batch * channels), longest, THREADS)
        chunks = 2 ** int(math.log2(most))
    return Tile(chunks, THREADS // chunks)
