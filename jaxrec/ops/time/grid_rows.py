"""Rows of a grid as nodes of a network along x: how the states that run along a row, from node to
node, join those that run across rows.

Pöppel et al., pLSTM: parallelizable linear source transition mark networks (2025),
arXiv:2506.11997, section 4.2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops.time import gating
from jaxrec.ops.time.gating import Flow


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


class Grid(NamedTuple):
    """Everything with the grid first: (x y b h ...), and (x y b h o ...) the gates."""

    q: Array  # (... jq k)
    k: Array  # (... jk k)
    v: Array  # (... jv v)
    gates: GridGates  # matrices: (jt jk*jv), (jt jt), (jo*jq jt)
    direct: Array  # (... jo*jq jk*jv)


class Rows(NamedTuple):
    """Rows along y as nodes of a network along x, and, where they were asked for, what enters and
    leaves them along y as one more input and output of each.
    """

    flow: Flow  # (x b h o ...) with states (y*jt), outputs (y*m) and inputs (y*s)
    gating: Array  # (x b h o y*m y*s), without D


def of_rows(
    gates: GridGates, flip: Sequence[bool], *, loop: bool = False, border: bool = False
) -> Rows:
    """The nodes that rows of nodes (x y b h o ...) make; `flip` says which of the o orientations
    run towards smaller y, and `loop` that products along a row are made one after the other.

    Within a row what goes down crosses the nodes between by the product of their T_du, and enters
    the network along x, or an output, where it arrives.
    """
    lead = (gates.transition_du.shape[0], *gates.transition_du.shape[2:5])
    # From here on b, h and o are one axis.
    gates = jax.tree.map(lambda z: merged_axes(jnp.moveaxis(z, 1, 4), 1, 3), gates)
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
    return jax.tree.map(lambda z: z.reshape(*lead, *z.shape[2:]), Rows(flow, across))


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
    z = jnp.zeros((), between.dtype) if local is None else on_diagonal(local)
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

    The gradient's sums are written as products of matrices, which XLA makes loops of on CPU
    otherwise.
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
def on_diagonal(blocks: Array) -> Array:
    """The matrix (... y*a y*c) with these blocks (... y a c) on its diagonal."""
    *batch, nodes, rows, columns = blocks.shape
    same = _padded_rank(jnp.eye(nodes, dtype=blocks.dtype)[:, None, :, None], blocks.ndim + 1)
    return (blocks[..., :, :, None, :] * same).reshape(*batch, nodes * rows, nodes * columns)


def _diagonal_forward(blocks):  # type: ignore[no-untyped-def]
    return on_diagonal(blocks), blocks.shape


def _diagonal_backward(shape, dy):  # type: ignore[no-untyped-def]
    *lead, nodes, rows, columns = shape
    dy = dy.reshape(*lead, nodes, rows, nodes, columns)
    return (jnp.moveaxis(jnp.diagonal(dy, axis1=-4, axis2=-2), -1, -3),)


on_diagonal.defvjp(_diagonal_forward, _diagonal_backward)


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


def merged_axes(z: Array, begin: int, count: int) -> Array:
    """Makes one axis of several: XLA's sums on CPU fail in arrays of seven axes and more."""
    return z.reshape(*z.shape[:begin], -1, *z.shape[begin + count :])
