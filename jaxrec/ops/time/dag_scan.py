"""The linear recurrence on the edges of directed acyclic graphs, many graphs at once.

The edge e from node u to node w carries a matrix state C_e, and with pairs of edges a -> e that
meet at u,

    C_e = s_e k_u v_u^T + sum_{a -> e} t_{a e} C_a
    y_w = sum_{e into w} m_e C_e^T q_w + d_w (k_w . q_w) v_w

with a source s and a mark m of each edge, a transition t of each pair, and what each node says to
itself, d. A sequence is the graph with one path: there this is a matrix scan with a decay of each
head.

The sum over pairs is a recurrence U_e = u_e + sum t_{a e} U_a of any row u_e. Its rounds (see
`dags`) run one after another, each a sorted gather and a segment sum. Run on the matrices it keeps
the states, k v numbers for each edge. Run on unit vectors of the nodes it counts paths: U_e then
holds, for each node, the weight of all paths that leave it and end with e, and

    y = (G * Q K^T) V,   G_{w u} = sum_{e into w} m_e U_e[u] + [w = u] d_w,

which is less work where a graph has fewer nodes than a state has numbers. The gradient is the same
recurrence on the pairs turned round, from the last round to the first,

    du_a = dU_a + sum_{a -> e} t_{a e} du_e,    dt_{a e} = U_a . du_e,

and keeps U alone.

Pöppel et al., pLSTM: parallelizable linear source transition mark networks (2025),
arXiv:2506.11997, section 3.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops.kept import kept
from jaxrec.ops.time.dags import DagBatch
from jaxrec.ops.time.gating import check_dtypes

Method = Literal["auto", "states", "paths"]


def dag_scan(
    q: Array,
    k: Array,
    v: Array,
    source: Array,
    transition: Array,
    mark: Array,
    direct: Array,
    dags: DagBatch,
    *,
    method: Method = "auto",
) -> Array:
    """Runs the recurrence over the graphs of a batch.

    Args:
      q: queries (b nodes h k); not scaled here.
      k: keys (b nodes h k).
      v: values (b nodes h v), in one dtype with q and k. What stands at the nodes of padding
        changes nothing if it is finite.
      source: s (b edges h), float32 as all gates, of the edges in the order of `dags`. What stands
        at the edges and pairs of padding changes nothing.
      transition: t (b pairs h), of the pairs in the order of `dags`.
      mark: m (b edges h).
      direct: d (b nodes h).
      dags: the graphs, from `dag_batch`.
      method: "states" carries matrices along the edges; "paths" finds the weights of all paths, for
        nodes squared numbers of each graph; "auto" takes "paths" where a graph has at most half as
        many nodes as a state has numbers.

    Returns:
      y (b nodes h v) in v's dtype; at a node of padding what its q, k, v and d make. Sums and
      states are float32 (float64 for such inputs).

    Raises:
      ValueError: shapes or dtypes do not fit each other or the graphs, or the method is unknown.
    """
    if method not in get_args(Method):
        raise ValueError(f"dag_scan: method must be one of {get_args(Method)}, got {method!r}.")
    wide = _check(q, k, v, source, transition, mark, direct, dags)
    dtype = v.dtype
    q, k, v, source, transition, mark, direct = (
        x.astype(wide) for x in (q, k, v, source, transition, mark, direct)
    )
    source, mark = (
        jnp.where(dags.is_edge[..., None], x, jnp.zeros((), wide)) for x in (source, mark)
    )
    nodes = q.shape[1]
    if method == "paths" or (method == "auto" and 2 * nodes <= q.shape[3] * v.shape[3]):
        units = jax.nn.one_hot(dags.tails, nodes, dtype=wide)
        weights = passed_on(source[..., None] * units[:, :, None], transition, dags)
        weights = sum_at(dags.heads, mark[..., None] * weights, nodes)
        weights += direct[..., None] * jnp.eye(nodes, dtype=wide)[None, :, None]
        scores = weights * jnp.einsum("bthk,bshk->bths", q, k)
        return jnp.einsum("bths,bshv->bthv", scores, v).astype(dtype)
    keys, values = (take(x, dags.tails) for x in (k, v))
    written = (source[..., None] * keys)[..., None] * values[..., None, :]
    states = passed_on(written.reshape(*source.shape, q.shape[3] * v.shape[3]), transition, dags)
    queries = mark[..., None] * take(q, dags.heads)
    read = jnp.einsum("behk,behkv->behv", queries, states.reshape(written.shape))
    to_itself = (direct * jnp.sum(q * k, axis=-1))[..., None] * v
    return (sum_at(dags.heads, read, nodes) + to_itself).astype(dtype)


def passed_on(rows: Array, transition: Array, dags: DagBatch) -> Array:
    """U_e = u_e + sum over pairs a -> e of t U_a, for rows u (b edges h x) and t (b pairs h)."""
    batch, rounds, width = dags.schedule.shape
    by_round = (batch, rounds * width)
    pairs, nowhere = dags.schedule.reshape(by_round), rows.shape[1]

    def in_rounds(x: Array, fill: Any = 0) -> Array:
        x = take(x, pairs, fill).reshape(batch, rounds, width, *x.shape[2:])
        return jnp.swapaxes(x, 0, 1)

    origins, targets = (in_rounds(x, nowhere) for x in (dags.origins, dags.targets))
    return _in_rounds(rows, in_rounds(transition), origins, targets)


@jax.custom_vjp
def _in_rounds(rows: Array, transition: Array, origins: Array, targets: Array) -> Array:
    """`passed_on` with what belongs to a round together: t (r b w h), edges (r b w)."""

    def step(rows: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        t, origin, target = inputs
        return _added(rows, target, t[..., None] * take(rows, origin)), None

    return lax.scan(step, rows, (transition, origins, targets))[0]


def _forward(rows, transition, origins, targets):  # type: ignore[no-untyped-def]
    rows = kept(_in_rounds(rows, transition, origins, targets))
    return rows, (rows, transition, origins, targets)


def _backward(residuals, cotangent):  # type: ignore[no-untyped-def]
    rows, *inputs = residuals

    def step(d: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        t, origin, target = inputs
        arrived = take(d, target)
        dt = jnp.sum(take(rows, origin) * arrived, axis=-1)
        return _added(d, origin, t[..., None] * arrived), dt

    d, dt = lax.scan(step, cotangent, tuple(inputs), reverse=True)
    return d, dt, None, None


_in_rounds.defvjp(_forward, _backward)


def take(x: Array, index: Array, fill: Any = 0) -> Array:
    """x (b m ...) at index (b j): (b j ...), and `fill` where an index lies behind the last."""
    if x.shape[1] == 0:
        return jnp.full_like(x, fill, shape=(*index.shape, *x.shape[2:]))
    return jax.vmap(lambda x, index: x.at[index].get(mode="fill", fill_value=fill))(x, index)


def sum_at(index: Array, x: Array, room: int) -> Array:
    """The sums (b room ...) of those x (b j ...) that share an index (b j)."""
    return _added(jnp.zeros_like(x, shape=(x.shape[0], room, *x.shape[2:])), index, x)


def _added(x: Array, index: Array, y: Array) -> Array:
    return jax.vmap(lambda x, index, y: x.at[index].add(y, mode="drop"))(x, index, y)


def _check(
    q: Array,
    k: Array,
    v: Array,
    source: Array,
    transition: Array,
    mark: Array,
    direct: Array,
    dags: DagBatch,
) -> jnp.dtype:
    """The dtype of the states."""
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            "dag_scan: q and k must be (b nodes h k) and v (b nodes h v), got"
            f" {q.shape}, {k.shape} and {v.shape}."
        )
    batch, nodes, heads, _ = q.shape
    edges, pairs = dags.tails.shape[1], dags.origins.shape[1]
    if dags.is_node.shape != (batch, nodes):
        raise ValueError(
            f"dag_scan: the graphs are padded to (b nodes) = {dags.is_node.shape}, but q is"
            f" {q.shape}."
        )
    for name, x, room, of in (
        ("source", source, edges, "edges"),
        ("transition", transition, pairs, "pairs"),
        ("mark", mark, edges, "edges"),
        ("direct", direct, nodes, "nodes"),
    ):
        if x.shape != (batch, room, heads):
            raise ValueError(
                f"dag_scan: {name} must be (b {of} h) = {(batch, room, heads)}, got {x.shape}."
            )
    gates = {"source": source, "transition": transition, "mark": mark, "direct": direct}
    check_dtypes("dag_scan", {"q": q, "k": k, "v": v, **gates})
    with jax.numpy_dtype_promotion("standard"):  # widening is what this function promises
        return jnp.result_type(direct.dtype, q.dtype)
