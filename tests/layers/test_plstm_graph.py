"""pLSTM layers on graphs: gates against their definition, for every kind, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.plstm_graph import PLSTMGraphConfig
from jaxrec.ops.time import dag, dag_batch
from jaxrec.testing import assert_close
from tests import references
from tests.ops.time.graphs import random_edges

SIZES, WIDTH, HEADS, PLACES, EDGE = (1, 4, 6), 6, 2, 5, 3
KINDS = {"node": {"max_edges": PLACES}, "edge": {"edge_width": EDGE, "bias": True}}


def config(kind, **options):
    sizes = {"width": WIDTH, "heads": HEADS, "key_width": 2, "value_width": 3}
    return PLSTMGraphConfig(**sizes, **KINDS[kind], **options)


def drawn(kind, **options):
    """A layer whose parameters are all random, so that every gate differs."""
    rng = np.random.default_rng(0)
    layer = nnx.eval_shape(lambda: config(kind, **options).build(rngs=nnx.Rngs(0)))
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32)), layer
    )


def graphs(mode):
    rng = np.random.default_rng(1)
    return [dag(nodes, random_edges(rng, nodes, 0.7), mode=mode) for nodes in SIZES]


def inputs(kind, dags):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(*dags.is_node.shape, WIDTH)).astype(np.float32)
    edges = rng.normal(size=(*dags.is_edge.shape, EDGE)).astype(np.float32)
    return x, edges if kind == "edge" else None


def affine(linear, x):
    y = np.tensordot(x, np.float64(linear.kernel[...]), axes=1)
    return y if linear.bias is None else y + np.float64(linear.bias[...])


def gates_of_nodes(layer, graph, x, edges):
    gates, far = layer.gates, layer.config.ends == "far"
    source, mark = (references.sigmoid(affine(gate, x)) for gate in (gates.source, gates.mark))
    t = affine(gates.transition, x)
    leaving, entering = graph.out_places, graph.in_places
    if far:
        leaving, entering = entering, leaving
    if layer.config.mode == "P":
        for node in range(graph.nodes):
            t[node, :, np.sum(graph.heads == node) :] = 0
        t = t / (0.5 + np.sum(np.abs(t), axis=-1, keepdims=True))
    else:
        t = np.tanh(t)
    s = [source[u, :, place] for u, place in zip(graph.tails, leaving, strict=True)]
    m = [mark[w, :, place] for w, place in zip(graph.heads, entering, strict=True)]
    pairs = zip(graph.origins, graph.targets, strict=True)
    return s, [t[graph.heads[a], :, entering[a], leaving[e]] for a, e in pairs], m


def gates_of_edges(layer, graph, x, edges):
    gates, end = layer.gates, graph.tails if layer.config.ends == "far" else graph.heads

    def gate(linear, *parts):
        return affine(linear, np.concatenate(parts))

    s, m = (
        [references.sigmoid(gate(of, x[n], z)) for n, z in zip(node, edges, strict=False)]
        for of, node in ((gates.source, graph.tails), (gates.mark, graph.heads))
    )
    t = [
        gate(gates.transition, edges[a], edges[e], x[end[a]])
        for a, e in zip(graph.origins, graph.targets, strict=True)
    ]
    if layer.config.mode == "D":
        return s, np.tanh(t), m
    sums = [
        sum(np.abs(other) for other, f in zip(t, graph.targets, strict=True) if f == e)
        for e in graph.targets
    ]
    return s, [one / (0.5 + total) for one, total in zip(t, sums, strict=True)], m


def loop(layer, graph, x, edges):
    x = np.float64(x[: graph.nodes])
    gates = gates_of_nodes if edges is None else gates_of_edges
    s, t, m = (np.reshape(gate, (-1, HEADS)) for gate in gates(layer, graph, x, edges))
    y = references.dag_scan(
        *(affine(linear, x) for linear in (layer.query, layer.key, layer.value)),
        *(s, t, m),
        references.sigmoid(affine(layer.gates.direct, x)),
        *(graph.tails, graph.heads, graph.origins, graph.targets),
    )
    y = y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + layer.config.norm_epsilon)
    y = y.reshape(graph.nodes, -1) * np.float64(layer.norm.scale[...])
    return affine(layer.out, y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["P", "D"])
@pytest.mark.parametrize("ends", ["near", "far"])
def test_every_kind_of_gate_equals_its_definition(kind, mode, ends):
    layer, found = drawn(kind, mode=mode, ends=ends), graphs(mode)
    dags = dag_batch(found)
    x, edges = inputs(kind, dags)
    y = jax.jit(lambda layer, x: layer(x, dags, edges))(layer, x)
    for i, graph in enumerate(found):
        want = loop(layer, graph, x[i], None if edges is None else np.float64(edges[i]))
        assert_close(y[i, : graph.nodes], want, rtol=1e-5, name=f"graph {i}")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_and_reach_every_parameter(kind):
    layer = drawn(kind)
    dags = dag_batch(graphs("P"))
    x, edges = inputs(kind, dags)
    gradient = jax.jit(jax.grad(lambda layer: jnp.sum(layer(x, dags, edges) ** 2)))(layer)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.all(np.isfinite(leaf)) and np.any(leaf != 0), path


def test_gates_begin_closed_and_transitions_as_identities():
    layer = config("node").build(rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.gates.transition.bias[...][1], np.eye(PLACES))
    assert np.all(layer.gates.source.bias[...] == -5)
    assert not np.any(layer.gates.mark.kernel[...])


def test_parts_may_be_left_out():
    layer = config("node", out=False, norm_scale=False, norm_bias=True).build(rngs=nnx.Rngs(0))
    dags = dag_batch(graphs("P"))
    x, _ = inputs("node", dags)
    assert layer(x, dags).shape == (3, 6, HEADS * 3)
    assert layer.norm.scale is None and layer.norm.bias is not None


def test_a_node_with_too_many_edges_is_refused_or_makes_nan():
    star = dag(PLACES + 2, [(0, i) for i in range(1, PLACES + 2)])
    dags = dag_batch([star])
    layer = config("node").build(rngs=nnx.Rngs(0))
    x, _ = inputs("node", dags)
    with pytest.raises(ValueError, match="6 edges leave a node, but max_edges is 5"):
        layer(x, dags)
    y = jax.jit(lambda layer, x, dags: layer(x, dags))(layer, x, dags)
    assert np.all(np.isnan(y[0, -1])) and not np.any(np.isnan(y[0, 1]))


def test_features_of_edges_must_fit():
    dags = dag_batch(graphs("P"))
    x, edges = inputs("edge", dags)
    with pytest.raises(ValueError, match=r"\(b edges edge_width\) = \(3, \d+, 3\), got None"):
        config("edge").build(rngs=nnx.Rngs(0))(x, dags)
    with pytest.raises(ValueError, match=r"= None, got \(3, \d+, 3\)"):
        config("node").build(rngs=nnx.Rngs(0))(x, dags, edges)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_edges": 3, "edge_width": 3}, "either max_edges, .* or edge_width, .* got 3 and 3"),
        ({}, "got None and None"),
        ({"max_edges": 0}, "max_edges must be >= 1, got 0"),
        ({"max_edges": 3, "mode": "PD"}, "mode must be one of P, D, got 'PD'"),
        ({"max_edges": 3, "ends": "own"}, "ends must be one of near, far"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PLSTMGraphConfig(width=4, heads=2, key_width=2, value_width=2, **options)
