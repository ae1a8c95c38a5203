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
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops.kept import kept
from jaxrec.ops.time import gating
from jaxrec.ops.time.gating import Flow, Nodes
from jaxrec.ops.time.grid_rows import Grid, GridGates, merged_axes, of_rows, on_diagonal
from jaxrec.ops.time.grid_tiles import tiled

Method = Literal["auto", "sequential", "rows", "parallel"]
LARGEST_WHOLE = 1024
"""Nodes of a grid up to which "auto" makes one gating tensor, (x y)^2 for each head."""
TILE = 16


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
        out = _whole(grid, orientations, method) if whole else tiled(grid, orientations, tile)
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


def _prepared(
    q: Array,
    k: Array,
    v: Array,
    gates: GridGates,
    direct: Array,
    orientations: tuple[int, ...],
    *,
    several: bool,
) -> Grid:
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
    return Grid(q, k, v, of_nodes, direct)


_TRANSPOSED = (0, 2, 1, 3)
"""Orientations of the transposed grid."""


def _transposed(grid: Grid) -> Grid:
    """The same with x and y exchanged."""
    rl, du, dl, ru = grid.gates[2:6]
    gates = GridGates(grid.gates.source_d, grid.gates.source_r, du, rl, ru, dl, *grid.gates[:5:-1])
    return jax.tree.map(lambda z: jnp.swapaxes(z, 0, 1), grid._replace(gates=gates))


def _whole(grid: Grid, orientations: tuple[int, ...], method: Method) -> Array:
    """y (x y b h jo v) of a grid whose nodes weigh each other directly."""
    form = {"parallel": _at_once, "rows": _by_rows}.get(method)
    if form is not None:
        return jax.checkpoint(lambda grid: form(grid, orientations))(grid)
    return _by_platform(grid, orientations)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _by_platform(grid: Grid, orientations: tuple[int, ...]) -> Array:
    return lax.platform_dependent(
        grid,
        cpu=functools.partial(_by_rows, orientations=orientations),
        default=functools.partial(_at_once, orientations=orientations),
    )


def _platform_forward(grid, orientations):  # type: ignore[no-untyped-def]
    return kept(_by_platform(grid, orientations)), grid


def _platform_backward(orientations, grid, dy):  # type: ignore[no-untyped-def]
    def gradient(form):  # type: ignore[no-untyped-def]
        def of(grid, dy):  # type: ignore[no-untyped-def]
            return jax.vjp(functools.partial(form, orientations=orientations), grid)[1](dy)

        return of

    return lax.platform_dependent(grid, dy, cpu=gradient(_by_rows), default=gradient(_at_once))


_by_platform.defvjp(_platform_forward, _platform_backward)


def _at_once(grid: Grid, orientations: tuple[int, ...]) -> Array:
    """By one gating tensor."""
    x, y = grid.q.shape[:2]
    q, k, v = (_all_nodes(z) for z in grid[:3])
    out = jnp.moveaxis(gating.gated(q, k, v, _gating(grid, orientations)), 2, 0)
    return out.reshape(x, y, *out.shape[1:])


def _all_nodes(z: Array) -> Array:
    """(x y b h ...) to (b h x*y ...)."""
    return jnp.moveaxis(z.reshape(-1, *z.shape[2:]), 0, 2)


def _gating(grid: Grid, orientations: tuple[int, ...]) -> Array:
    """The gating tensor of a whole grid, (b h x*y*m x*y*s).

    Each row of nodes along y is a node of a network along x. Orientations that run towards larger
    x pass it onward, the others back, and G is made once, of all of them.
    """
    onward, back, direct = _networks(grid, orientations, loop=False)
    return gating.merged(Nodes(onward, back, direct)).gating[0]


def _networks(
    grid: Grid, orientations: tuple[int, ...], *, loop: bool
) -> tuple[Flow | None, Flow | None, Array]:
    """The networks along x in both directions, whose nodes are rows; and how outputs of a row weigh
    its own inputs, in all orientations together, (x b h y*m y*s).
    """
    rows = of_rows(grid.gates, [bool(o & 2) for o in orientations], loop=loop)
    flows: list[Flow | None] = []
    for back in (0, 1):
        which = [i for i, o in enumerate(orientations) if o & 1 == back]
        flows.append(
            jax.tree.map(lambda z, which=which: _some(z, which), rows.flow) if which else None
        )
    direct = on_diagonal(jnp.moveaxis(merged_axes(grid.direct, 2, 2), 1, 2))
    direct = direct.reshape(direct.shape[0], *grid.direct.shape[2:4], *direct.shape[2:])
    direct = direct + jnp.sum(rows.gating, axis=3)
    return flows[0], flows[1], direct


def _by_rows(grid: Grid, orientations: tuple[int, ...]) -> Array:
    """One row after the other; orientations that run towards smaller x have a batch of their own,
    which is turned round.

    Instead of states the loop carries what each input so far has become where it leaves the last
    row, for all inputs at once; so a row costs two products, and nothing is merged.
    """
    x = grid.q.shape[0]
    *flows, own = _networks(grid, orientations, loop=True)
    turns = [bool(back) for back, flow in enumerate(flows) if flow is not None]

    def turned(z: Array, axis: int) -> Array:
        """z (x ...) as each direction meets it."""
        return _side_by_side([jnp.flip(z, 0) if turn else z for turn in turns], axis)

    k, v = (_all_nodes(turned(z, 2)) for z in (grid.k, grid.v))
    q = jnp.moveaxis(turned(grid.q, 2), 1, 3)
    flow = _both_onward(*flows)
    # The outputs of a row weigh its own inputs once, in the first direction.
    own = jnp.flip(own, 0) if turns[0] else own
    own = _side_by_side([own] + [jnp.zeros_like(own)] * (len(turns) - 1), 1)

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
    apart = jnp.moveaxis(out.reshape(x, -1, len(turns), *out.shape[2:]), 2, 0)
    each = [jnp.flip(z, 0) if turn else z for z, turn in zip(apart, turns, strict=True)]
    return jnp.moveaxis(functools.reduce(jnp.add, each), 3, 1)


def _side_by_side(parts: list[Array], axis: int) -> Array:
    """Parts of one shape along the axis of the batch, those of a row next to each other, so that
    rows which lie on several devices stay where they are.
    """
    return merged_axes(jnp.stack(parts, axis + 1), axis, 2)


def _both_onward(onward: Flow | None, back: Flow | None) -> Flow:
    """Both side by side, as if both ran onward; zeros where one has fewer orientations."""
    flows = [] if onward is None else [onward]
    if back is not None:
        flows.append(jax.tree.map(lambda z: jnp.flip(z, 0), back))
    count = max(flow.mark.shape[3] for flow in flows)

    def joined(*parts: Array) -> Array:
        fill = [[(0, 0)] * 3 + [(0, count - z.shape[3])] + [(0, 0)] * 2 for z in parts]
        return _side_by_side([jnp.pad(z, f) for z, f in zip(parts, fill, strict=True)], 1)

    return jax.tree.map(joined, *flows)


def _some(z: Array, which: list[int]) -> Array:
    """Those orientations of (... o a c)."""
    return jnp.stack([z[..., i, :, :] for i in which], axis=-3)
