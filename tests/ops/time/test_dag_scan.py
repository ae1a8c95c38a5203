"""What the laws, which see one path, do not say of `dag_scan`: graphs of every form at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.time import DagShape, dag, dag_batch, dag_scan, shape_of
from jaxrec.testing import assert_close
from tests import references
from tests.ops.time.graphs import random_edges

METHODS = ("states", "paths")
HEADS, KEYS, VALUES = 2, 3, 4
SIZES = (1, 2, 5, 9)


def graphs(mode, sizes=SIZES, **options):
    rng = np.random.default_rng(0)
    return [dag(nodes, random_edges(rng, nodes, 0.6), mode=mode, **options) for nodes in sizes]


def arguments(batch, seed=0):
    """Normal numbers everywhere, at padding too."""
    (b, nodes), (_, edges), pairs = batch.is_node.shape, batch.is_edge.shape, batch.origins.shape[1]
    shapes = [(nodes, HEADS, KEYS)] * 2 + [(nodes, HEADS, VALUES)]
    shapes += [(room, HEADS) for room in (edges, pairs, edges, nodes)]
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(b, *shape)).astype(np.float32) for shape in shapes]


def loop(args, dags):
    """The float64 loop of each graph on what is not padding: (nodes h v) each."""
    out = []
    for graph, row in zip(dags, zip(*args, strict=True), strict=True):
        sizes = [graph.nodes] * 3 + [len(x) for x in (graph.tails, graph.origins, graph.tails)]
        real = [x[:size] for x, size in zip(row, [*sizes, graph.nodes], strict=True)]
        out.append(references.dag_scan(*real, *graph[1:3], graph.origins, graph.targets))
    return out


def wide(args):
    return [x.astype(np.float64) for x in args]


@pytest.mark.parametrize("mode", ["P", "D"])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_different_graphs_equals_their_loops(method, mode):
    dags = graphs(mode)
    batch = dag_batch(dags)
    args = arguments(batch)
    y = jax.jit(lambda *args: dag_scan(*args, batch, method=method))(*args)
    for got, want in zip(y, loop(wide(args), dags), strict=True):
        assert_close(got[: len(want)], want, rtol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_loops(method):
    """Against central differences in float64; nothing passes to what stands at padding."""
    dags = graphs("P", (4, 6))
    batch = dag_batch(dags, DagShape(7, 17, 60, 9, 4))
    args = arguments(batch)
    weights = np.random.default_rng(1).normal(size=(2, 7, HEADS, VALUES)).astype(np.float32)
    weights = weights * batch.is_node[..., None, None]
    grads = jax.jit(
        jax.grad(
            lambda *args: jnp.sum(weights * dag_scan(*args, batch, method=method)),
            argnums=tuple(range(7)),
        )
    )(*args)

    def loss(args):
        rows = zip(weights.astype(np.float64), loop(args, dags), strict=True)
        return sum(np.sum(weight[: len(y)] * y) for weight, y in rows)

    rng, exact = np.random.default_rng(2), wide(args)
    for i, grad in enumerate(grads):
        direction = rng.normal(size=grad.shape)
        ends = [
            loss([x + sign * 1e-5 * direction if i == j else x for j, x in enumerate(exact)])
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / 2e-5
        norm = np.linalg.norm(grad) * np.linalg.norm(direction)
        assert abs(np.sum(np.asarray(grad) * direction) - slope) < 1e-6 * norm
    rooms = [[g.nodes for g in dags]] * 3
    rooms += [
        [len(x) for x in part] for part in zip(*[(g.tails, g.origins) for g in dags], strict=True)
    ]
    for grad, room in zip(grads, [*rooms, rooms[3], rooms[0]], strict=True):
        for row, size in zip(grad, room, strict=True):
            assert not np.any(row[size:])


@pytest.mark.parametrize("method", METHODS)
def test_a_union_of_graphs_is_the_graphs(method):
    dags = graphs("P", (5, 9))
    batch = dag_batch(dags)
    offsets = np.cumsum([0, *(g.nodes for g in dags)])
    ends = [np.stack(g[1:3], axis=1) + at for g, at in zip(dags, offsets[:-1], strict=True)]
    union = dag(int(offsets[-1]), np.concatenate(ends))
    assert len(union.origins) == sum(len(g.origins) for g in dags)
    args = arguments(batch)
    whole = dag_batch([union])
    gates = arguments(whole)
    nodes = [np.concatenate([x[i, : g.nodes] for i, g in enumerate(dags)])[None] for x in args]
    # each edge and pair of a graph gets the gates that the union's has
    where = {tuple(end): i for i, end in enumerate(np.stack(union[1:3], axis=1).tolist())}
    pairs = {pair: i for i, pair in enumerate(zip(union.origins, union.targets, strict=True))}
    for i, (g, end) in enumerate(zip(dags, ends, strict=True)):
        index = np.array([where[tuple(e)] for e in end.tolist()])
        for j in (3, 5):
            args[j][i, : len(index)] = gates[j][0, index]
        found = [pairs[pair] for pair in zip(index[g.origins], index[g.targets], strict=True)]
        args[4][i, : len(found)] = gates[4][0, found]
    got = dag_scan(*nodes[:3], *gates[3:6], nodes[6], whole, method=method)[0]
    want = dag_scan(*args, batch, method=method)
    want = np.concatenate([want[i, : g.nodes] for i, g in enumerate(dags)])
    assert_close(got, want, rtol=2e-6)


def test_what_stands_at_padding_changes_nothing():
    dags = graphs("P")
    batch = dag_batch(dags, DagShape(12, 60, 200, 12, 16))
    args = arguments(batch)
    masks = [batch.is_node] * 3 + [batch.is_edge, batch.origins < 60, batch.is_edge, batch.is_node]
    other = [
        np.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, np.float32(fill))
        for x, mask, fill in zip(args, masks, [7.0] * 3 + [np.nan] * 3 + [7.0], strict=True)
    ]
    for method in METHODS:
        y, again = (dag_scan(*a, batch, method=method) for a in (args, other))
        real = batch.is_node[..., None, None]
        np.testing.assert_array_equal(np.where(real, y, 0), np.where(real, again, 0))


def test_the_trace_does_not_grow_with_the_graphs():
    def equations(nodes):
        batch = dag_batch([dag(nodes, random_edges(np.random.default_rng(0), nodes, 0.5))])
        trace = jax.make_jaxpr(jax.grad(lambda *a: jnp.sum(dag_scan(*a, batch))))(*arguments(batch))
        return str(trace).count("=")

    assert equations(8) == equations(11)


def test_auto_finds_paths_where_graphs_are_smaller_than_states():
    for nodes, method in ((6, "paths"), (7, "states")):
        batch = dag_batch(graphs("P", (nodes,)))
        args = arguments(batch)
        auto, named = (dag_scan(*args, batch, method=m) for m in ("auto", method))
        np.testing.assert_array_equal(auto, named)


def test_wrong_arguments_are_refused():
    batch = dag_batch(graphs("P", (3, 4)))
    args = arguments(batch)

    def refused(message, *, method="auto", **wrong):
        names = ("q", "k", "v", "source", "transition", "mark", "direct")
        given = [wrong.get(name, x) for name, x in zip(names, args, strict=True)]
        with pytest.raises(ValueError, match=message):
            dag_scan(*given, batch, method=method)

    refused("method must be one of", method="rounds")
    refused("q and k must be", k=args[1][..., :1])
    refused(r"source must be \(b edges h\)", source=args[3][:, :1])
    refused(r"transition must be \(b pairs h\)", transition=args[4][..., :1])
    refused("gates must all be float32", direct=np.zeros(args[6].shape, np.int32))
    refused("gates must all be float32", mark=jnp.asarray(args[5], jnp.bfloat16))
    refused("q, k and v must have one floating dtype", v=jnp.asarray(args[2], jnp.bfloat16))
    refused("q, k and v must have one floating dtype", k=args[1].astype(np.int32))
    larger = dag_batch(graphs("P", (3, 4)), DagShape(5, *shape_of(graphs("P", (3, 4)))[1:]))
    with pytest.raises(ValueError, match=r"the graphs are padded to \(b nodes\) = \(2, 5\)"):
        dag_scan(*args, larger)
