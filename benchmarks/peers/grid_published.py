"""The recurrence on a grid as its paper computes it: a gating tensor, merged four cells at a time.

Written from the description of the algorithm in Pöppel et al., pLSTM: parallelizable linear source
transition mark networks (2025), arXiv:2506.11997, section 4.2; the authors' program is not part of
it. Both sides of the grid are padded with zeros to the next power of two. At each level four cells
become one: a state on each edge inside is the sum over all paths to it, of matrices from what
enters the four and from their inputs. The tensors of all orientations are turned back and added,
and JAX differentiates all of it, so that every level is kept. One state is tracked.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrec.ops.time import GridGates


class Cells(NamedTuple):
    """Squares of side s, (b h x y ...): states pass s edges on each of their four sides."""

    source_r: jax.Array  # (s w z): of the node (w, z) inside, to the edges that leave along x
    source_d: jax.Array
    rl: jax.Array  # (s s): of the edges that enter along x, to those that leave along x
    du: jax.Array
    dl: jax.Array
    ru: jax.Array
    mark_l: jax.Array  # (w z s)
    mark_u: jax.Array
    gating: jax.Array  # (w z w z): of outputs, then of inputs


def grid_scan(q, k, v, gates, direct, *, orientation):
    """`jaxrec.ops.time.grid_scan` for several orientations and one tracked state; the axes j* may
    be there, of size 1.
    """
    lead, keys = q.shape[:4], q.shape[4]
    sizes = q.shape[1:3]
    count = len(orientation)
    q_, k_, v_ = (x.reshape(*lead, x.shape[4]) for x in (q, k, v))
    gates = jax.tree.map(lambda x: x.reshape(*lead[:3], count, lead[3]), gates)
    side = 1 << (max(sizes) - 1).bit_length()
    turned = [
        _turned(jax.tree.map(lambda x, i=i: x[:, :, :, i], gates), side, o)
        for i, o in enumerate(orientation)
    ]
    whole = _gating(jax.tree.map(lambda *each: jnp.concatenate(each, axis=1), *turned))
    parts = jnp.split(whole, count, axis=1)
    total = sum(_turned_back(part, o) for part, o in zip(parts, orientation, strict=True))
    total = total[:, :, : sizes[0], : sizes[1], : sizes[0], : sizes[1]]
    scores = jnp.einsum("bxyhk,bwzhk->bhxywz", q_, k_)
    y = jnp.einsum("bhxywz,bwzhv->bxyhv", scores * total, v_)
    own = direct.reshape(*lead, 1) * jnp.sum(q_ * k_, axis=-1, keepdims=True) * v_
    return ((y + own) * keys**-0.5).reshape(v.shape)


def _turned(gates, side, orientation):
    """Gates (b x y h) of one orientation on the padded grid, turned, (b h x y)."""
    turned = tuple(axis for axis in (1, 2) if orientation >> (axis - 1) & 1)

    def prepared(x):
        fill = [(0, 0), (0, side - x.shape[1]), (0, side - x.shape[2]), (0, 0)]
        return jnp.moveaxis(jnp.flip(jnp.pad(x, fill), turned), 3, 1)

    nothing = jnp.zeros_like(gates.transition_rl)
    return GridGates(*(prepared(nothing if x is None else x) for x in gates))


def _gating(gates):
    """G of gates (b h x y), (b h x y x' y')."""
    cells = Cells(
        source_r=gates.source_r[..., None, None, None],
        source_d=gates.source_d[..., None, None, None],
        rl=gates.transition_rl[..., None, None],
        du=gates.transition_du[..., None, None],
        dl=gates.transition_dl[..., None, None],
        ru=gates.transition_ru[..., None, None],
        mark_l=gates.mark_l[..., None, None, None],
        mark_u=gates.mark_u[..., None, None, None],
        gating=jnp.zeros((*gates.mark_l.shape, 1, 1, 1, 1)),
    )
    while cells.rl.shape[2] > 1:
        cells = _merged(cells)
    return cells.gating[:, :, 0, 0]


def _turned_back(gating, orientation):
    """(b h x y x' y'), as the grid lies."""
    axes = [axis for axis in (0, 1) if orientation >> axis & 1]
    return jnp.flip(gating, [2 + axis for axis in axes] + [4 + axis for axis in axes])


def _merged(cells):
    """Cells of twice the side, each of four."""
    side, nodes = cells.rl.shape[-1], cells.rl.shape[-1] ** 2
    left, up, outputs = {}, {}, {}
    for x in (0, 1):
        left[0, x], up[x, 0] = {("l", x): None}, {("u", x): None}
    for x in (0, 1):
        for y in (0, 1):
            cell = Cells(*(z[:, :, x::2, y::2] for z in cells))
            lead, own = cell.rl.shape[:4], ("s", x, y)
            marks = (z.reshape(*lead, nodes, side) for z in (cell.mark_l, cell.mark_u))
            from_l, from_u, around = left[x, y], up[x, y], [cell.rl, cell.ru, cell.du, cell.dl]
            rl, ru, du, dl = around
            sources = (z.reshape(*lead, side, nodes) for z in (cell.source_r, cell.source_d))
            of_r, of_d = sources
            mark_l, mark_u = marks
            left[x + 1, y] = _sum(_through(rl, from_l), _through(ru, from_u), {own: of_r})
            up[x, y + 1] = _sum(_through(du, from_u), _through(dl, from_l), {own: of_d})
            inside = {own: cell.gating.reshape(*lead, nodes, nodes)}
            outputs[x, y] = _sum(_through(mark_l, from_l), _through(mark_u, from_u), inside)
    right = [left[2, y] for y in (0, 1)]
    down = [up[x, 2] for x in (0, 1)]
    pairs = ["l", "u"]
    rl, ru = (_of_borders(right, name) for name in pairs)
    dl, du = (_of_borders(down, name) for name in pairs)
    source_r, source_d = (_of_sources(rows, side) for rows in (right, down))
    of_marks = {
        name: _over_cells(
            {at: _of_borders([outputs[at]], name) for at in outputs}, (side, side, 2 * side), -3
        )
        for name in pairs
    }
    inner = {at: _of_sources([outputs[at]], side) for at in outputs}
    gating = _over_cells(inner, (side, side, 2 * side, 2 * side), -4)
    return Cells(source_r, source_d, rl, du, dl, ru, of_marks["l"], of_marks["u"], gating)


def _through(matrix, state):
    """A state, as matrices of what it came from (None: it is that), after one more matrix."""
    return {of: matrix if x is None else jnp.matmul(matrix, x) for of, x in state.items()}


def _sum(*states):
    total = {}
    for state in states:
        for of, x in state.items():
            total[of] = total[of] + x if of in total else x
    return total


def _of_borders(rows, name):
    """(... rows 2s): what a state in each row came to from both halves of a border."""
    shape = next(x for row in rows for of, x in row.items() if of[0] == name).shape
    shapes = [(*shape[:-2], next(iter(row.values())).shape[-2], shape[-1]) for row in rows]
    lines = [
        jnp.concatenate([row.get((name, half), jnp.zeros(made)) for half in (0, 1)], axis=-1)
        for row, made in zip(rows, shapes, strict=True)
    ]
    return jnp.concatenate(lines, axis=-2)


def _of_sources(rows, side):
    """(... rows 2s 2s): what a state in each row came to from the nodes of all four cells."""
    lines = []
    for row in rows:
        some = next(x for of, x in row.items() if of[0] == "s")
        zeros = jnp.zeros(some.shape)
        parts = {(x, y): row.get(("s", x, y), zeros) for x in (0, 1) for y in (0, 1)}
        lines.append(_over_cells(parts, (some.shape[-2], side, side), -2))
    return jnp.concatenate(lines, axis=-3)


def _over_cells(parts, shape, axis):
    """Parts by (x, y), of the trailing shape given, side by side along two axes."""
    whole = {at: z.reshape(*z.shape[:4], *shape) for at, z in parts.items()}
    lines = [jnp.concatenate([whole[x, 0], whole[x, 1]], axis=axis + 1) for x in (0, 1)]
    return jnp.concatenate(lines, axis=axis)
