"""The linear source-transition-mark recurrence on a grid (pLSTM in two dimensions).

States lie on the edges of the grid. With l the state that comes to node (x, y) from (x-1, y) and u
the one from (x, y-1), both zero outside the grid,

    to (x+1, y):   T_rl l + T_ru u + S_r k v
    to (x, y+1):   T_du u + T_dl l + S_d k v
    out:           scale (M_l l q + M_u u q + D (q . k) v)

Further orientations run from another corner of the grid; all add to the output, D once.

Pöppel et al., pLSTM: parallelizable linear source transition mark networks (2025),
arXiv:2506.11997, sections 3 and 4.2.
"""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops.time import gating
from jaxrec.ops.time.gating import Flow, Nodes

Method = Literal["auto", "sequential", "rows", "parallel"]
LARGEST_WHOLE = 1024
"""Nodes of a grid up to which "auto" makes one gating tensor, (x y)^2 for each head."""
TILE = 16
"""Side of the tiles of larger grids."""


class GridGates(NamedTuple):
    """Gates of all nodes: (b x y h ...) in one orientation, (b x y o h ...) in o of them."""

    source_r: Array  # (... jt jk jv), to the next x
    source_d: Array  # (... jt jk jv), to the next y
    transition_rl: Array  # (... jt jt), from the last x to the next
    transition_du: Array  # (... jt jt), from the last y to the next
    transition_dl: Array | None  # (... jt jt), from the last x to the next y; None: zero
    transition_ru: Array | None  # (... jt jt), from the last y to the next x; None: zero
    mark_l: Array  # (... jo jq jt), of what comes from the last x
    mark_u: Array  # (... jo jq jt), of what comes from the last y


def grid_scan(
    q: Array,
    k: Array,
    v: Array,
    gates: GridGates,
    direct: Array,
    *,
    orientation: int | Sequence[int] = 0,
    scale: float | None = None,
    tile: int | None = None,
    method: Method = "auto",
) -> Array:
    """Runs the recurrence over a grid.

    Args:
      q: queries (b x y h k jq).
      k: keys (b x y h k jk).
      v: values (b x y h v jv), in one dtype with q and k.
      gates: of all nodes, float32, any number of nodes along x and y.
      direct: D, (b x y h jo jq jk jv), float32.
        Where every J is 1 their axes may be left out everywhere: q (b x y h k), gates (b x y h).
      orientation: 0 runs towards larger x and y, 1 towards smaller x, 2 towards smaller y, 3
        towards smaller both; or several, of which the gates then have an axis o. Gates, q, k, v and
        the output stay where they are whatever the orientation.
      scale: factor on y; None: 1 / sqrt(k).
      tile: side of the squares whose gating tensors are made, between which states are carried;
        None: the whole grid up to 1024 nodes, 16 beyond, with "auto", and the whole grid with
        "parallel".
      method: "sequential" is a loop over anti-diagonals of nodes that carries their states, the
        definition; "parallel" merges nodes in logarithmic depth into a gating tensor, which weighs
        the products of queries and keys, and loops over anti-diagonals of tiles if there are
        several; "rows" makes that tensor row by row, in a loop; "auto" is parallel on accelerators
        and in tiles, and rows on CPU, where fewer and larger products compile faster.

    Returns:
      y (b x y h v jo), or (b x y h v), in v's dtype. The gradient works gating tensors out again.

    Raises:
      ValueError: shapes or dtypes do not fit, the grid is empty, the tile is below 1, or the method
        or an orientation is unknown.
    """
    if method not in get_args(Method):
        raise ValueError(f"grid_scan: method must be one of {get_args(Method)}, got {method!r}.")
    if tile is not None and (tile < 1 or method in ("sequential", "rows")):
        raise ValueError(
            "grid_scan: tile must be >= 1, and the method auto or parallel, got"
            f" {tile} and {method}."
        )
    several = not isinstance(orientation, int)
    orientations = tuple(orientation) if isinstance(orientation, Sequence) else (orientation,)
    grid = _prepared(q, k, v, gates, direct, orientations, several=several)
    x, y = grid.q.shape[:2]
    if method == "sequential":
        tile = 1
    elif tile is None:
        tile = TILE if method == "auto" and x * y > LARGEST_WHOLE else max(x, y)
    whole = tile >= max(x, y) and method != "sequential"
    # States lie along y within a row, and along x within an anti-diagonal: the shorter side each.
    swap = x < y if whole else x > y
    if swap:
        grid, orientations = _transposed(grid), tuple(_TRANSPOSED[o] for o in orientations)
    with gating.precision(q):
        out = _whole(grid, orientations, method) if whole else _tiled(grid, orientations, tile)
    out = jnp.swapaxes(out, 0, 1) if swap else out
    scale = q.shape[4] ** -0.5 if scale is None else scale
    out = jnp.transpose(out * jnp.asarray(scale, out.dtype), (2, 0, 1, 3, 5, 4)).astype(v.dtype)
    return out if q.ndim == 6 else out[..., 0]


def gating_tensor(
    gates: GridGates, direct: Array, *, orientation: int | Sequence[int] = 0
) -> Array:
    """G, by which the output of each node weighs the product of query, key and value of each.

    Args:
      gates: as for `grid_scan`.
      direct: as for `grid_scan`.
      orientation: as for `grid_scan`.

    Returns:
      (b h x y jo*jq x' y' jk*jv), float32: first of the output, then of the input.
    """
    several = not isinstance(orientation, int)
    orientations = tuple(orientation) if isinstance(orientation, Sequence) else (orientation,)
    tracked = direct.shape[4:] or (1, 1, 1, 1)
    shape = direct.shape[:4]
    q, k, v = (jnp.zeros_like(direct, shape=(*shape, 1, tracked[i])) for i in (1, 2, 3))
    if direct.ndim == 4:
        q, k, v = (z[..., 0] for z in (q, k, v))
    grid = _prepared(q, k, v, gates, direct, orientations, several=several)
    x, y, batch, heads, rows, columns = grid.direct.shape
    whole = _gating(grid, orientations)
    return whole.reshape(batch, heads, x, y, rows, x, y, columns)


class _Grid(NamedTuple):
    """Everything with the grid first: (x y b h ...), and (x y b h o ...) the gates."""

    q: Array  # (... jq k)
    k: Array  # (... jk k)
    v: Array  # (... jv v)
    gates: GridGates  # matrices: (jt jk*jv), (jt jt), (jo*jq jt)
    direct: Array  # (... jo*jq jk*jv)


def _prepared(
    q: Array,
    k: Array,
    v: Array,
    gates: GridGates,
    direct: Array,
    orientations: tuple[int, ...],
    *,
    several: bool,
) -> _Grid:
    if not orientations or any(o not in (0, 1, 2, 3) for o in orientations):
        raise ValueError(
            f"grid_scan: orientation must be 0, 1, 2 or 3, or some of them, got {orientations}."
        )
    lead = "b x y o h" if several else "b x y h"
    axes = dict.fromkeys(GridGates._fields[:2], "jt jk jv")
    axes |= dict.fromkeys(GridGates._fields[2:6], "jt jt")
    axes |= dict.fromkeys(GridGates._fields[6:], "jo jq jt")
    arrays, sizes = gating.prepared(
        "grid_scan",
        {
            "q": (q, "b x y h k jq"),
            "k": (k, "b x y h k jk"),
            "v": (v, "b x y h v jv"),
            **{name: (x, f"{lead} {axes[name]}") for name, x in gates._asdict().items()},
            "direct": (direct, "b x y h jo jq jk jv"),
        },
    )
    if several and sizes["o"] != len(orientations):
        raise ValueError(
            f"grid_scan: gates are of {sizes['o']} orientations, but orientation names"
            f" {len(orientations)}: {orientations}."
        )
    if sizes["x"] == 0 or sizes["y"] == 0:
        raise ValueError(f"grid_scan: the grid has no nodes, got q of shape {q.shape}.")

    def grid_first(name: str) -> Array | None:
        if name not in arrays:
            return None
        x = arrays[name]
        if name not in GridGates._fields:
            return jnp.moveaxis(x, 0, 2)
        if not several:
            x = x[:, :, :, None]
        return jnp.transpose(x, (1, 2, 0, 4, 3, 5, 6))

    q, k, v = (jnp.moveaxis(jnp.swapaxes(arrays[name], -1, -2), 0, 2) for name in "qkv")
    of_nodes = GridGates(*(grid_first(name) for name in GridGates._fields))  # type: ignore[arg-type]
    direct = jnp.moveaxis(arrays["direct"], 0, 2)
    return _Grid(q, k, v, of_nodes, direct)


_TRANSPOSED = (0, 2, 1, 3)
"""Orientations of the transposed grid."""


def _transposed(grid: _Grid) -> _Grid:
    """The same with x and y exchanged."""
    rl, du, dl, ru = grid.gates[2:6]
    gates = GridGates(grid.gates.source_d, grid.gates.source_r, du, rl, ru, dl, *grid.gates[:5:-1])
    return jax.tree.map(lambda z: jnp.swapaxes(z, 0, 1), grid._replace(gates=gates))


def _whole(grid: _Grid, orientations: tuple[int, ...], method: Method) -> Array:
    """y (x y b h jo v) of a grid whose nodes weigh each other directly."""
    form = {"parallel": _at_once, "rows": _by_rows}.get(method)
    if form is not None:
        return jax.checkpoint(lambda grid: form(grid, orientations))(grid)
    return _by_platform(grid, orientations)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _by_platform(grid: _Grid, orientations: tuple[int, ...]) -> Array:
    return lax.platform_dependent(
        grid,
        cpu=functools.partial(_by_rows, orientations=orientations),
        default=functools.partial(_at_once, orientations=orientations),
    )


def _platform_forward(grid, orientations):  # type: ignore[no-untyped-def]
    return _by_platform(grid, orientations), grid


def _platform_backward(orientations, grid, dy):  # type: ignore[no-untyped-def]
    def gradient(form):  # type: ignore[no-untyped-def]
        def of(grid, dy):  # type: ignore[no-untyped-def]
            return jax.vjp(functools.partial(form, orientations=orientations), grid)[1](dy)

        return of

    return lax.platform_dependent(grid, dy, cpu=gradient(_by_rows), default=gradient(_at_once))


_by_platform.defvjp(_platform_forward, _platform_backward)


def _at_once(grid: _Grid, orientations: tuple[int, ...]) -> Array:
    """By one gating tensor."""
    x, y = grid.q.shape[:2]
    q, k, v = (_all_nodes(z) for z in grid[:3])
    out = jnp.moveaxis(gating.gated(q, k, v, _gating(grid, orientations)), 2, 0)
    return out.reshape(x, y, *out.shape[1:])


def _all_nodes(z: Array) -> Array:
    """(x y b h ...) to (b h x*y ...)."""
    return jnp.moveaxis(z.reshape(-1, *z.shape[2:]), 0, 2)


def _gating(grid: _Grid, orientations: tuple[int, ...]) -> Array:
    """The gating tensor of a whole grid, (b h x*y*m x*y*s).

    Each row of nodes along y is a node of a network along x. Orientations that run towards larger
    x pass it onward, the others back, and G is made once, of all of them.
    """
    onward, back, direct = _networks(grid, orientations, loop=False)
    return gating.merged(Nodes(onward, back, direct)).gating[0]


def _networks(
    grid: _Grid, orientations: tuple[int, ...], *, loop: bool
) -> tuple[Flow | None, Flow | None, Array]:
    """The networks along x in both directions, whose nodes are rows; and how outputs of a row weigh
    its own inputs, in all orientations together, (x b h y*m y*s).
    """
    rows = _rows(grid.gates, [bool(o & 2) for o in orientations], loop=loop)
    flows: list[Flow | None] = []
    for back in (0, 1):
        which = [i for i, o in enumerate(orientations) if o & 1 == back]
        flows.append(
            jax.tree.map(lambda z, which=which: _some(z, which), rows.flow) if which else None
        )
    direct = _on_diagonal(jnp.moveaxis(_merged_axes(grid.direct, 2, 2), 1, 2))
    direct = direct.reshape(direct.shape[0], *grid.direct.shape[2:4], *direct.shape[2:])
    direct = direct + jnp.sum(rows.gating, axis=3)
    return flows[0], flows[1], direct


def _by_rows(grid: _Grid, orientations: tuple[int, ...]) -> Array:
    """One row after the other; orientations that run towards smaller x have a batch of their own,
    which is turned round.

    Instead of states the loop carries what each input so far has become where it leaves the last
    row, for all inputs at once; so a row costs two products, and nothing is merged.
    """
    x = grid.q.shape[0]
    *flows, own = _networks(grid, orientations, loop=True)
    turns = [bool(back) for back, flow in enumerate(flows) if flow is not None]

    def turned(z: Array, axis: int) -> Array:
        """z (x ...) as each direction meets it, side by side along the axis of the batch."""
        return jnp.concatenate([jnp.flip(z, 0) if turn else z for turn in turns], axis)

    k, v = (_all_nodes(turned(z, 2)) for z in (grid.k, grid.v))
    q = jnp.moveaxis(turned(grid.q, 2), 1, 3)
    flow = _side_by_side(*flows)
    # The outputs of a row weigh its own inputs once, in the first direction.
    own = jnp.flip(own, 0) if turns[0] else own
    own = jnp.pad(own, [(0, 0), (0, flow.mark.shape[1] - own.shape[1])] + [(0, 0)] * 3)

    @jax.checkpoint
    def step(reached: Array, row: tuple[Flow, Array, Array, Array]) -> tuple[Array, Array]:
        flow, own, q, begin = row
        weights = jnp.einsum("bhomr,bhors->bhms", flow.mark, reached, precision=gating.EXACT)
        inside = lax.dynamic_update_slice_in_dim(jnp.zeros_like(weights), own, begin, 3)
        out = gating.gated(q, k, v, weights + inside)
        reached = jnp.matmul(flow.transition, reached, precision=gating.EXACT)
        return lax.dynamic_update_slice_in_dim(reached, flow.source, begin, 4), out

    inputs = own.shape[-1]
    start = jnp.zeros_like(flow.source, shape=(*flow.source.shape[1:-1], x * inputs))
    _, out = lax.scan(step, start, (flow, own, q, jnp.arange(x, dtype=jnp.int32) * inputs))
    each = jnp.split(out, len(turns), axis=1)
    each = [jnp.flip(z, 0) if turn else z for z, turn in zip(each, turns, strict=True)]
    return jnp.moveaxis(functools.reduce(jnp.add, each), 3, 1)


def _side_by_side(onward: Flow | None, back: Flow | None) -> Flow:
    """Both along the axis of the batch, as if both ran onward; zeros where one has fewer
    orientations.
    """
    flows = [] if onward is None else [onward]
    if back is not None:
        flows.append(jax.tree.map(lambda z: jnp.flip(z, 0), back))
    count = max(flow.mark.shape[3] for flow in flows)

    def joined(*parts: Array) -> Array:
        fill = [[(0, 0)] * 3 + [(0, count - z.shape[3])] + [(0, 0)] * 2 for z in parts]
        return jnp.concatenate([jnp.pad(z, f) for z, f in zip(parts, fill, strict=True)], axis=1)

    return jax.tree.map(joined, *flows)


def _merged_axes(z: Array, begin: int, count: int) -> Array:
    """Makes one axis of several: XLA's sums on CPU fail in arrays of seven axes and more."""
    return z.reshape(*z.shape[:begin], -1, *z.shape[begin + count :])


def _some(z: Array, which: list[int]) -> Array:
    """Those orientations of (... o a c)."""
    return jnp.stack([z[..., i, :, :] for i in which], axis=-3)


class _Rows(NamedTuple):
    """Rows along y as nodes of a network along x, and, where they were asked for, what enters and
    leaves them along y as one more input and output of each.
    """

    flow: Flow  # (x b h o ...) with states (y*jt), outputs (y*m) and inputs (y*s)
    gating: Array  # (x b h o y*m y*s), without D


def _rows(
    gates: GridGates, flip: Sequence[bool], *, loop: bool = False, border: bool = False
) -> _Rows:
    """The nodes that rows of nodes (x y b h o ...) make; `flip` says which of the o orientations
    run towards smaller y, and `loop` that products along a row are made one after the other.

    Within a row what goes down crosses the nodes between by the product of their T_du, and enters
    the network along x, or an output, where it arrives.
    """
    lead = (gates.transition_du.shape[0], *gates.transition_du.shape[2:5])
    several = lead[-1]
    # From here on b, h and o are one axis.
    gates = jax.tree.map(lambda z: _merged_axes(jnp.moveaxis(z, 1, 4), 1, 3), gates)
    carried = _carried(_flipped(gates.transition_du, flip, -3), loop=loop)
    between = _flipped(_flipped(carried[..., :-1, 1:, :, :], flip, -3), flip, -4)
    to_r, to_out = gates.transition_ru, gates.mark_u
    of_l, of_in = gates.transition_dl, gates.source_d
    flow = Flow(
        _crossed(gates.transition_rl, to_r, between, of_l),
        _crossed(gates.source_r, to_r, between, of_in),
        _crossed(gates.mark_l, to_out, between, of_l),
    )
    across = _crossed(None, to_out, between, of_in)
    if border:
        entering = _flipped(carried[..., :-1, 0, :, :], flip, -3)
        leaving = _flipped(carried[..., -1, 1:, :, :], flip, -3)
        flow, across = _with_border(
            gates, flow, across, entering, leaving, carried[..., -1, 0, :, :]
        )
    assert several == len(flip)
    return jax.tree.map(lambda z: z.reshape(*lead, *z.shape[2:]), _Rows(flow, across))


def _with_border(
    gates: GridGates, flow: Flow, across: Array, entering: Array, leaving: Array, through: Array
) -> tuple[Flow, Array]:
    """Rows with one more input, which enters along y, and one more output, which leaves so.

    Args:
      gates: of the rows' nodes.
      flow: of rows without.
      across: how their outputs weigh their own inputs.
      entering: (... y j j), how what enters the row reaches each node.
      leaving: (... y j j), how what leaves each node reaches the row's end.
      through: (... j j), from one end to the other.
    """
    batch, tracked = across.shape[:-2], entering.shape[-1]

    def arrived(reader: Array | None) -> Array:
        """(y*a j): how what enters the row along y reaches outputs a of its nodes."""
        if reader is None:
            return jnp.zeros_like(across, shape=(*flow.transition.shape[:-1], tracked))
        z = jnp.matmul(reader, entering, precision=gating.EXACT)
        return z.reshape(*batch, -1, tracked)

    def left(source: Array | None) -> Array:
        """(j y*c): how inputs c of its nodes reach what leaves the row along y."""
        if source is None:
            return jnp.zeros_like(across, shape=(*batch, tracked, flow.transition.shape[-1]))
        z = jnp.matmul(leaving, source, precision=gating.EXACT)
        return jnp.moveaxis(z, -2, -3).reshape(*batch, tracked, -1)

    flow = flow._replace(
        source=jnp.concatenate([flow.source, arrived(gates.transition_ru)], axis=-1),
        mark=jnp.concatenate([flow.mark, left(gates.transition_dl)], axis=-2),
    )
    of_nodes = jnp.concatenate([across, arrived(gates.mark_u)], axis=-1)
    at_end = jnp.concatenate([left(gates.source_d), through], axis=-1)
    return flow, jnp.concatenate([of_nodes, at_end], axis=-2)


def _carried(step: Array, *, loop: bool) -> Array:
    """Products of the T_du (... y j j) of nodes in a row, (... y+1 y+1 j j).

    Entry (a, b) is what becomes, where a state enters node a, of one that entered node b; y stands
    for the end of the row. It is the identity for a = b, and zero for a < b.
    """
    count, tracked = step.shape[-3], step.shape[-1]
    identity = _padded_rank(jnp.eye(tracked, dtype=step.dtype), step.ndim)
    if loop:
        here = _padded_rank(jnp.eye(count + 1, dtype=bool)[..., None, None], step.ndim + 1)
        here = jnp.moveaxis(jnp.broadcast_to(here, (*here.shape[:-2], 1, 1)), -4, 0)
        start = jnp.where(here[0], identity, jnp.zeros((), step.dtype))
        start = start + jnp.zeros_like(step[..., :1, :, :])

        def body(row: Array, node: tuple[Array, Array]) -> tuple[Array, Array]:
            by, here = node
            if tracked == 1:
                row = _scaled(by, jnp.ones_like(by), row[..., None, :, 0, 0])[..., 0, 0, 0, :]
                row = row[..., None, None]
            else:
                row = _after(row, by[..., None, :, :])
            row = jnp.where(here, identity, row)
            return row, row

        _, rows = lax.scan(body, start, (jnp.moveaxis(step, -3, 0), here[1:]))
        return jnp.moveaxis(jnp.concatenate([start[None], rows]), 0, -4)
    behind = jnp.arange(count + 1)[:, None] - jnp.arange(count + 1)[None, :]
    behind = _padded_rank(behind[:, :, None, None], step.ndim + 1)
    steps = jnp.concatenate([jnp.zeros_like(step[..., :1, :, :]), step], axis=-3)
    factors = jnp.where(behind > 0, steps[..., :, None, :, :], identity[None])
    products = lax.associative_scan(_after, factors, axis=factors.ndim - 4)
    return jnp.where(behind >= 0, products, jnp.zeros((), step.dtype))


def _after(first: Array, second: Array) -> Array:
    if first.shape[-1] == 1:
        return second * first
    return jnp.matmul(second, first, precision=gating.EXACT)


def _crossed(
    local: Array | None, reader: Array | None, between: Array, source: Array | None
) -> Array:
    """A matrix from inputs c of all nodes of a row to outputs a, (... y*a y*c): `local` (... y a c)
    within each node, and reader (... y a j), between (... y y j j), source (... y j c) from node to
    node.
    """
    z = jnp.zeros((), between.dtype) if local is None else _on_diagonal(local)
    if reader is None or source is None:
        return z
    if between.shape[-1] == 1:
        reached = _scaled(reader[..., 0], between[..., 0, 0], source[..., 0, :])
    else:
        reached = jnp.einsum("...yai,...yzij->...yazj", reader, between, precision=gating.EXACT)
        reached = jnp.einsum("...yazj,...zjc->...yazc", reached, source, precision=gating.EXACT)
    *batch, nodes, rows, _, columns = reached.shape
    return z + reached.reshape(*batch, nodes * rows, nodes * columns)


@jax.custom_vjp
def _scaled(rows: Array, z: Array, columns: Array) -> Array:
    """rows (... y a) times z (... y z) times columns (... z c), (... y a z c).

    The gradient's sums are written as products of matrices, which XLA's on CPU are not: they take
    ten times as long.
    """
    return rows[..., :, :, None, None] * z[..., :, None, :, None] * columns[..., None, None, :, :]


def _scaled_forward(rows, z, columns):  # type: ignore[no-untyped-def]
    return _scaled(rows, z, columns), (rows, z, columns)


def _scaled_backward(residuals, dy):  # type: ignore[no-untyped-def]
    rows, z, columns = residuals
    *lead, height, made, width, taken = dy.shape
    both = (dy * z[..., :, None, :, None]).reshape(*lead, height * made, width * taken)
    drows = jnp.matmul(both, columns.reshape(*lead, -1, 1), precision=gating.EXACT)
    dcolumns = jnp.matmul(rows.reshape(*lead, 1, -1), both, precision=gating.EXACT)
    weighed = dy * rows[..., :, :, None, None] * columns[..., None, None, :, :]
    dz = jnp.sum(weighed, axis=(-3, -1))
    return drows.reshape(rows.shape), dz, dcolumns.reshape(columns.shape)


_scaled.defvjp(_scaled_forward, _scaled_backward)


@jax.custom_vjp
def _on_diagonal(blocks: Array) -> Array:
    """The matrix (... y*a y*c) with these blocks (... y a c) on its diagonal."""
    *batch, nodes, rows, columns = blocks.shape
    same = _padded_rank(jnp.eye(nodes, dtype=blocks.dtype)[:, None, :, None], blocks.ndim + 1)
    return (blocks[..., :, :, None, :] * same).reshape(*batch, nodes * rows, nodes * columns)


def _diagonal_forward(blocks):  # type: ignore[no-untyped-def]
    return _on_diagonal(blocks), blocks.shape


def _diagonal_backward(shape, dy):  # type: ignore[no-untyped-def]
    *lead, nodes, rows, columns = shape
    dy = dy.reshape(*lead, nodes, rows, nodes, columns)
    return (jnp.moveaxis(jnp.diagonal(dy, axis1=-4, axis2=-2), -1, -3),)


_on_diagonal.defvjp(_diagonal_forward, _diagonal_backward)


def _padded_rank(x: Array, rank: int) -> Array:
    return x.reshape((1,) * (rank - x.ndim) + x.shape)


def _flipped(z: Array, flip: Sequence[bool], axis: int) -> Array:
    """z (x b*h*o ...) with an axis turned round for those orientations that `flip` names."""
    if len(set(flip)) == 1:
        return jnp.flip(z, axis) if flip[0] else z
    apart = z.reshape(z.shape[0], -1, len(flip), *z.shape[2:])
    each = [
        jnp.flip(apart[:, :, i], axis) if turned else apart[:, :, i]
        for i, turned in enumerate(flip)
    ]
    return jnp.stack(each, axis=2).reshape(z.shape)


def _tiled(grid: _Grid, orientations: tuple[int, ...], tile: int) -> Array:
    """y (x y b h jo v) by tiles that pass states on; every orientation has its own turned copy.

    The gradient stores the states between tiles, and works tiles out again, one anti-diagonal at a
    time.
    """
    x, y = grid.q.shape[:2]
    across = [_of_tiles(size, tile) for size in (x, y)]
    turned = [_turned(grid, i, o, across) for i, o in enumerate(orientations)]
    tiles = jax.tree.map(lambda *each: jnp.stack(each, axis=4), *turned)
    # (i j x y o b h ...): the o orientations become part of the batch.
    tiles = jax.tree.map(lambda z: z.reshape(*z.shape[:4], -1, *z.shape[6:]), tiles)
    out = _wavefront(tiles)
    out = out.reshape(*out.shape[:4], len(orientations), -1, *out.shape[5:])
    whole = (_joined(out[:, :, :, :, i], o, (x, y)) for i, o in enumerate(orientations))
    return sum(whole, jnp.zeros((), out.dtype))


def _of_tiles(size: int, tile: int) -> tuple[int, int]:
    """How many tiles, as equal as they can be, and their side."""
    count = -(-size // tile)
    return count, -(-size // count)


def _turned(grid: _Grid, index: int, orientation: int, across: list[tuple[int, int]]) -> _Grid:
    """One orientation's grid, turned so that it runs towards larger x and y, in tiles
    (i j x y b h ...). Padding has gates of zero.
    """
    gates = jax.tree.map(lambda z: z[:, :, :, :, index], grid.gates)
    direct = grid.direct if index == 0 else jnp.zeros_like(grid.direct)

    def cut(z: Array) -> Array:
        for axis, (count, side) in enumerate(across):
            if orientation >> axis & 1:
                z = jnp.flip(z, axis)
            more = [(0, 0)] * z.ndim
            more[axis] = (0, count * side - z.shape[axis])
            z = jnp.pad(z, more)
        (rows, width), (columns, height) = across
        z = z.reshape(rows, width, columns, height, *z.shape[2:])
        return jnp.swapaxes(z, 1, 2)

    return jax.tree.map(cut, grid._replace(gates=gates, direct=direct))


def _joined(tiles: Array, orientation: int, shape: tuple[int, int]) -> Array:
    """The reverse of `_turned`, for (i j x y b h ...)."""
    rows, columns, width, height = tiles.shape[:4]
    z = jnp.swapaxes(tiles, 1, 2).reshape(rows * width, columns * height, *tiles.shape[4:])
    z = z[: shape[0], : shape[1]]
    flips = [axis for axis in (0, 1) if orientation >> axis & 1]
    return jnp.flip(z, flips) if flips else z


def _wavefront(tiles: _Grid) -> Array:
    """y (i j x y b h jo v): all tiles (i, j) with i + j = d at once, for one d after the other.

    A tile is a node of a grid of tiles, whose states are those of all edges that cross its border.
    """
    rows, columns, width, height, batch, heads = tiles.q.shape[:6]
    wide = tiles.direct.dtype
    tracked = tiles.gates.transition_rl.shape[-1]
    widths = tiles.q.shape[-1], tiles.v.shape[-1]

    def states(side: int) -> Array:
        shape = (rows, batch, heads, side * tracked, *widths)
        return jnp.zeros_like(tiles.direct, shape=shape)

    @jax.checkpoint
    def step(carry: tuple[Array, Array], diagonal: _Grid) -> tuple[tuple[Array, Array], Array]:
        right, up = carry
        left = jnp.concatenate([jnp.zeros_like(right[:1]), right[:-1]])
        node, direct = _tile_node(diagonal.gates, diagonal.direct)
        q, k, v = (_in_a_row(z) for z in diagonal[:3])
        y = gating.gated(q, k, v, direct)
        y = y + gating.read(node.mark_l, left, q) + gating.read(node.mark_u, up, q)
        right = gating.passed(node.transition_rl, left) + gating.written(node.source_r, k, v)
        down = gating.passed(node.transition_du, up) + gating.written(node.source_d, k, v)
        if node.transition_ru is not None:
            right = right + gating.passed(node.transition_ru, up)
        if node.transition_dl is not None:
            down = down + gating.passed(node.transition_dl, left)
        return (right, down), y

    skewed = jax.tree.map(_skewed, tiles)
    _, y = lax.scan(step, (states(height), states(width)), skewed)
    y = _straightened(y, columns).astype(wide)
    y = y.reshape(rows, columns, batch, heads, width, height, *y.shape[-2:])
    return jnp.moveaxis(y, (4, 5), (2, 3))


def _in_a_row(z: Array) -> Array:
    """Nodes of tiles (i x y b h ...) in a row, (i b h x*y ...)."""
    z = z.reshape(z.shape[0], -1, *z.shape[3:])
    return jnp.moveaxis(z, 1, 3)


def _skewed(z: Array) -> Array:
    """(i j ...) to (d i ...) with d = i + j, and zeros where no such j is."""
    rows, columns = z.shape[:2]
    diagonals = rows + columns - 1
    z = jnp.pad(z, [(0, 0), (0, diagonals + 1 - columns)] + [(0, 0)] * (z.ndim - 2))
    z = z.reshape(rows * (diagonals + 1), *z.shape[2:])[: rows * diagonals]
    return jnp.swapaxes(z.reshape(rows, diagonals, *z.shape[1:]), 0, 1)


def _straightened(z: Array, columns: int) -> Array:
    """The reverse of `_skewed`."""
    diagonals, rows = z.shape[:2]
    z = jnp.swapaxes(z, 0, 1).reshape(rows * diagonals, *z.shape[2:])
    z = jnp.pad(z, [(0, rows)] + [(0, 0)] * (z.ndim - 1))
    return z.reshape(rows, diagonals + 1, *z.shape[1:])[:, :columns]


def _tile_node(gates: GridGates, direct: Array) -> tuple[GridGates, Array]:
    """The one node that each tile of nodes (i x y b h ...) makes, (i b h ...), and its G."""
    count, width, height, batch, heads = direct.shape[:5]
    if width == height == 1:
        return jax.tree.map(lambda z: z[:, 0, 0], (gates, direct))
    tracked = gates.transition_rl.shape[-1]

    def in_batch(z: Array) -> Array:
        return jnp.moveaxis(z, 0, 2).reshape(width, height, count * batch, heads, *z.shape[5:])

    gates, direct = jax.tree.map(in_batch, (gates, direct))
    rows = _rows(jax.tree.map(lambda z: z[:, :, :, :, None], gates), [False], border=True)
    own = _on_diagonal(jnp.moveaxis(_merged_axes(direct, 2, 2), 1, 2))
    own = own.reshape(width, count * batch, heads, *own.shape[2:])
    own = jnp.pad(own, [(0, 0)] * 3 + [(0, tracked)] * 2)
    node = gating.merged(Nodes(rows.flow, None, rows.gating[:, :, :, 0] + own))
    assert node.onward is not None
    transition, source, mark = (z[0, :, :, 0] for z in node.onward)
    source, transition_ru = _apart(source, width, tracked, -1)
    mark, transition_dl = _apart(mark, width, tracked, -2)
    at_nodes, at_end = _apart(node.gating[0], width, tracked, -2)
    whole, mark_u = _apart(at_nodes, width, tracked, -1)
    source_d, transition_du = _apart(at_end, width, tracked, -1)
    made = GridGates(
        source_r=source,
        source_d=source_d,
        transition_rl=transition,
        transition_du=transition_du,
        transition_dl=transition_dl,
        transition_ru=transition_ru,
        mark_l=mark,
        mark_u=mark_u,
    )
    return jax.tree.map(lambda z: z.reshape(count, batch, heads, *z.shape[2:]), (made, whole))


def _apart(z: Array, rows: int, tracked: int, axis: int) -> list[Array]:
    """What belongs to the nodes of each row, and what crosses its border, along an axis where one
    comes after the other for every row.
    """
    axis += z.ndim
    before, behind = z.shape[:axis], z.shape[axis + 1 :]
    z = z.reshape(*before, rows, -1, *behind)
    parts = jnp.split(z, [z.shape[axis + 1] - tracked], axis=axis + 1)
    return [part.reshape(*before, -1, *behind) for part in parts]
