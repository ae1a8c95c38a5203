"""The algebra of source-transition-mark networks: nodes in a row, and the one node that they make.

A node reads the state C that enters it, changes it, and adds to it,

    y = M C + D x,    C' = T C + S x,

and a first node followed by a second is a node again, whose x and y are those of both:

    T = T_2 T_1,   S = [T_2 S_1, S_2],   M = [M_1; M_2 T_1],   D = [[D_1, 0], [M_2 S_1, D_2]].

So a row of nodes becomes one in logarithmic depth; its D is the gating tensor G, by which every
output weighs every input. On a grid the nodes are rows of a grid, whose states lie side by side.

Pöppel et al., pLSTM: parallelizable linear source transition mark networks (2025),
arXiv:2506.11997, sections 3 and 4.
"""

import contextlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

EXACT = lax.Precision.HIGHEST


class Flow(NamedTuple):
    """How states pass the nodes of a row, in one direction; o directions that share x and y."""

    transition: Array  # (n ... o r r): of the state that enters, to the one that leaves
    source: Array  # (n ... o r s): of x
    mark: Array  # (n ... o m r): of y


class Nodes(NamedTuple):
    """Nodes in a row. A direction that nothing passes in is None."""

    onward: Flow | None  # from the first node to the last
    back: Flow | None  # from the last to the first
    gating: Array  # (n ... m s): D, of all directions together


def merged(nodes: Nodes) -> Nodes:
    """The one node (leading axis 1) that all nodes of a row make.

    Pairs are merged at once, level by level. What an odd number leaves over is merged with what
    the levels before left over, so nothing is padded.
    """
    rest: Nodes | None = None
    count = nodes.gating.shape[0]
    while count > 1 or rest is not None:
        if count % 2:
            last = _nodes(nodes, slice(count - 1, count))
            rest = last if rest is None else merge(last, rest)
        if count < 2:
            assert rest is not None
            return rest
        even = count // 2 * 2
        nodes = merge(_nodes(nodes, slice(0, even, 2)), _nodes(nodes, slice(1, even, 2)))
        count = even // 2
    return nodes


def _nodes(nodes: Nodes, which: slice) -> Nodes:
    return jax.tree.map(lambda x: x[which], nodes)


def merge(left: Nodes, right: Nodes) -> Nodes:
    """Each node of `left` with the one of `right` that follows it."""
    onward, below = None, None
    if left.onward is not None and right.onward is not None:
        onward, below = _followed(left.onward, right.onward, reverse=False)
    back, above = None, None
    if left.back is not None and right.back is not None:
        back, above = _followed(right.back, left.back, reverse=True)
    if below is None:
        below = jnp.zeros_like(right.gating, shape=_crossing(right.gating, left.gating))
    if above is None:
        above = jnp.zeros_like(left.gating, shape=_crossing(left.gating, right.gating))
    of_left = jnp.concatenate([left.gating, above], axis=-1)
    of_right = jnp.concatenate([below, right.gating], axis=-1)
    return Nodes(onward, back, jnp.concatenate([of_left, of_right], axis=-2))


def _crossing(to: Array, of: Array) -> tuple[int, ...]:
    return (*to.shape[:-1], of.shape[-1])


def _followed(first: Flow, second: Flow, *, reverse: bool) -> tuple[Flow, Array]:
    """A node and the one behind it, and how the second's y weighs the first's x; `reverse` if the
    second lies before the first.
    """
    sources = [jnp.matmul(second.transition, first.source, precision=EXACT), second.source]
    marks = [first.mark, jnp.matmul(second.mark, first.transition, precision=EXACT)]
    if reverse:
        sources.reverse()
        marks.reverse()
    flow = Flow(
        jnp.matmul(second.transition, first.transition, precision=EXACT),
        jnp.concatenate(sources, axis=-1),
        jnp.concatenate(marks, axis=-2),
    )
    across = jnp.einsum("...omr,...ors->...ms", second.mark, first.source, precision=EXACT)
    return flow, across


def gated(q: Array, k: Array, v: Array, gating: Array) -> Array:
    """y_a = sum_b (q_a G_ab k_b) v_b, as dense products.

    Args:
      q: (... n q k) with q queries for each of n nodes.
      k: (... m p k) with p keys for each of m nodes.
      v: (... m j v) with j values.
      gating: G, (... n*o*q m*p*j) with o outputs.

    Returns:
      (... n o v) in G's dtype.
    """
    to, queries = q.shape[-3:-1]
    of, keys = k.shape[-3:-1]
    values, wide, batch = v.shape[-2], gating.dtype, gating.shape[:-2]
    outputs = gating.shape[-2] // (to * queries)
    gating = gating.reshape(*batch, to, outputs, queries, of, keys, values)
    weights = jnp.zeros((), wide)
    # One query and one key at a time: XLA's sums on CPU fail in arrays of as many axes as all have.
    for i in range(queries):
        for j in range(keys):
            scores = jnp.einsum(
                "...ak,...bk->...ab", q[..., i, :], k[..., j, :], preferred_element_type=wide
            )
            weights = weights + scores[..., :, None, :, None] * gating[..., i, :, j, :]
    weights = weights.reshape(*batch, to * outputs, of * values).astype(v.dtype)
    flat = v.reshape(*v.shape[:-3], of * values, v.shape[-1])
    y = jnp.matmul(weights, flat, preferred_element_type=wide)
    return y.reshape(*batch, to, outputs, v.shape[-1])


def read(mark: Array, state: Array, q: Array) -> Array:
    """M C q: what nodes with marks (... n*o*q r) and queries (... n q k) read from a state
    (... r k v) that enters all of them; (... n o v).
    """
    nodes, queries = q.shape[-3:-1]
    seen = jnp.einsum("...nqk,...rkv->...nqrv", q.astype(state.dtype), state)
    mark = mark.reshape(*mark.shape[:-2], nodes, -1, queries, mark.shape[-1])
    return jnp.einsum("...noqr,...nqrv->...nov", mark, seen)


def written(source: Array, k: Array, v: Array) -> Array:
    """S k v: what nodes with sources (... r n*p*j), keys (... n p k) and values (... n j v) leave
    in the state behind all of them; (... r k v).
    """
    nodes, keys = k.shape[-3:-1]
    wide = source.dtype
    source = source.reshape(*source.shape[:-1], nodes, keys, v.shape[-2])
    values = jnp.einsum("...rnpj,...njv->...rnpv", source, v.astype(wide))
    return jnp.einsum("...npk,...rnpv->...rkv", k.astype(wide), values)


def passed(transition: Array, state: Array) -> Array:
    """T C, for a state (... r k v)."""
    return jnp.einsum("...ir,...rkv->...ikv", transition, state, precision=EXACT)


def prepared(
    name: str, arguments: Mapping[str, tuple[Array | None, str]]
) -> tuple[dict[str, Array], dict[str, int]]:
    """The arguments of a source-transition-mark op, checked, and the sizes of their axes.

    Args:
      name: of the op, for messages.
      arguments: name -> array and its axes, such as "b t h jt jk jv": first q, k and v, then gates,
        of which those that are None are left out. The axes j* of all may be missing together.

    Returns:
      The arrays with all axes, gates as the matrices that they are: (jt jk*jv) the sources, (jt jt)
      the transitions, (jo*jq jt) the marks, (jo*jq jk*jv) the direct gate; and axis -> size.

    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    given = {key: (x, axes.split()) for key, (x, axes) in arguments.items() if x is not None}
    q, letters = given["q"]
    scalar = q.ndim == len(letters) - 1
    sizes: dict[str, int] = {}
    arrays: dict[str, Array] = {}
    for key, (x, axes) in given.items():
        missing = sum(axis.startswith("j") for axis in axes) if scalar else 0
        kept = axes[: len(axes) - missing]
        known = [sizes.get(axis, size) for axis, size in zip(kept, x.shape, strict=False)]
        if x.ndim != len(kept) or list(x.shape) != known:
            wanted = " ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in kept)
            raise ValueError(f"{name}: {key} must be ({wanted}), got {x.shape}.")
        sizes |= dict(zip(kept, x.shape, strict=True))
        arrays[key] = x.reshape(*x.shape, *(1 for _ in range(missing)))
    sizes = {axis: 1 for _, axes in given.values() for axis in axes} | sizes
    check_dtypes(name, arrays)
    for key, (_, axes) in given.items():
        if key not in _ACTIVATIONS:
            arrays[key] = _as_matrix(arrays[key], axes, sizes)
    return arrays, sizes


_ACTIVATIONS = ("q", "k", "v")


def _as_matrix(gate: Array, axes: list[str], sizes: dict[str, int]) -> Array:
    own = [axis for axis in axes if axis.startswith("j")]
    rows = 1 if own[0] == "jt" else 2
    lead = gate.shape[: gate.ndim - len(own)]
    matrix = (math.prod(sizes[axis] for axis in part) for part in (own[:rows], own[rows:]))
    return gate.reshape(*lead, *matrix)


def check_dtypes(name: str, arrays: Mapping[str, Array]) -> None:
    """Checks that q, k and v have one floating dtype, and that all others, the gates, are float32
    (or all float64).

    Raises:
      ValueError: they are not; the message begins with the name of the op.
    """
    activations = {key: x.dtype for key, x in arrays.items() if key in _ACTIVATIONS}
    gates = {key: x.dtype for key, x in arrays.items() if key not in _ACTIVATIONS}
    if len(set(activations.values())) > 1 or not jnp.issubdtype(activations["q"], jnp.floating):
        listed = ", ".join(f"{key} {dtype}" for key, dtype in activations.items())
        raise ValueError(f"{name}: q, k and v must have one floating dtype, got {listed}.")
    if len(set(gates.values())) > 1 or arrays["direct"].dtype not in (jnp.float32, jnp.float64):
        listed = ", ".join(f"{key} {dtype}" for key, dtype in gates.items())
        raise ValueError(
            f"{name}: gates must all be float32, in which a gate of 0.9999 is not yet 1, got"
            f" {listed}."
        )


def precision(q: Array) -> Any:
    """Products of float32 are exact to float32, which accelerators do not do by themselves; those
    of shorter numbers are as the device prefers.
    """
    if jnp.finfo(q.dtype).bits < 32:
        return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")
