"""A grid in tiles, which pass on the states of all edges that cross their borders.

Pöppel et al., pLSTM: parallelizable linear source transition mark networks (2025),
arXiv:2506.11997, section 4.2.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops.time import gating
from jaxrec.ops.time.gating import Nodes
from jaxrec.ops.time.grid_rows import Grid, GridGates, merged_axes, of_rows, on_diagonal


def tiled(grid: Grid, orientations: tuple[int, ...], tile: int) -> Array:
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


def _turned(grid: Grid, index: int, orientation: int, across: list[tuple[int, int]]) -> Grid:
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


def _wavefront(tiles: Grid) -> Array:
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
    def step(carry: tuple[Array, Array], diagonal: Grid) -> tuple[tuple[Array, Array], Array]:
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
    rows = of_rows(jax.tree.map(lambda z: z[:, :, :, :, None], gates), [False], border=True)
    own = on_diagonal(jnp.moveaxis(merged_axes(direct, 2, 2), 1, 2))
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
