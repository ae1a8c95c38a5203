"""One label for a whole graph, by pLSTM layers along its edges, forth and back.

    x = W_in u + sinusoids of the number of neighbours
    x = x + P(norm(x));  x = x + mlp(norm(x));  x = x + D(norm(x));  x = x + mlp(norm(x))  per layer
    logits = W_2 relu(W_1 mean over nodes of x)

Every second layer runs on the graph with all edges turned round. Gates read the nodes and the
edges; edges without features of their own have the mean of their ends.

Pöppel et al., pLSTM: parallelizable linear source transition mark networks (2025),
arXiv:2506.11997, section 5 and appendix.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxrec.config import at_least, multiple_of
from jaxrec.layers.axes import constrain
from jaxrec.layers.linear import Linear
from jaxrec.layers.norm import RMSNorm
from jaxrec.layers.plstm_graph import PLSTMGraph, PLSTMGraphConfig, small
from jaxrec.ops.depth import remat_scan
from jaxrec.ops.time.dag_scan import Method, sum_at, take
from jaxrec.ops.time.dags import Dag, DagBatch, DagShape, Mode, dag, dag_batch, shape_of

LONGEST_WAVE = 10000.0


class GraphOrders(NamedTuple):
    """A graph as the layers run over it: forward and with its edges turned round."""

    p: tuple[Dag, Dag]
    d: tuple[Dag, Dag]


class GraphShapes(NamedTuple):
    """What graphs are padded to."""

    p: DagShape
    d: DagShape


class GraphInputs(NamedTuple):
    """A batch of graphs, in NumPy as it is made."""

    nodes: Array  # (b nodes features) float32, zero at padding
    p: DagBatch  # (b 2 ...): forward and turned round
    d: DagBatch
    edges: Array | None = None  # (b edges features) float32, in the order of the lists of edges


def graph_orders(
    nodes: int, edges: np.ndarray | Sequence[tuple[int, int]], *, directed: bool = False
) -> GraphOrders:
    """All that a model needs of one graph; arguments and errors as of `dag`."""

    def both(mode: Mode) -> tuple[Dag, Dag]:
        forward, back = (
            dag(nodes, edges, mode=mode, directed=directed, reverse=turned)
            for turned in (False, True)
        )
        return forward, back

    return GraphOrders(both("P"), both("D"))


def graph_shapes(orders: Sequence[GraphOrders]) -> GraphShapes:
    """The shapes that fit every batch of these graphs.

    Raises:
      ValueError: there is no graph.
    """
    return GraphShapes(
        shape_of([graph for order in orders for graph in order.p]),
        shape_of([graph for order in orders for graph in order.d]),
    )


def graph_inputs(
    features: Sequence[np.ndarray],
    orders: Sequence[GraphOrders],
    edges: Sequence[np.ndarray] | None = None,
    *,
    shapes: GraphShapes | None = None,
) -> GraphInputs:
    """Pads graphs to one batch.

    Args:
      features: of the nodes of each graph, (nodes features).
      orders: of each graph.
      edges: features of the edges of each graph, (edges features), in the order of its list; None:
        there are none.
      shapes: what to pad to; None: the smallest that fit.

    Raises:
      ValueError: features do not fit the graphs, a graph is larger than the shapes, or there is
        none.
    """
    shapes = graph_shapes(orders) if shapes is None else shapes
    for name, given, sizes in (
        ("features", features, [order.p[0].nodes for order in orders]),
        ("edges", edges, [len(order.p[0].tails) for order in orders]),
    ):
        got = sizes if given is None else [len(x) for x in given]
        if got != sizes:
            raise ValueError(f"graph_inputs: {name} must have {sizes} rows, got {got}.")

    def padded(rows: Sequence[np.ndarray], room: int) -> np.ndarray:
        return np.stack([np.pad(x, ((0, room - len(x)), (0, 0))) for x in rows]).astype(np.float32)

    def both(mode: Mode, shape: DagShape) -> DagBatch:
        ways = [
            dag_batch([(order.p if mode == "P" else order.d)[way] for order in orders], shape)
            for way in (0, 1)
        ]
        return jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *ways)

    leaves: list[Any] = [padded(features, shapes.p.nodes), both("P", shapes.p), both("D", shapes.d)]
    leaves.append(None if edges is None else padded(edges, shapes.p.edges))
    return GraphInputs(*leaves)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphClassifierConfig:
    """Sizes of a model; those of the published runs but for the data's own."""

    features: int  # of a node
    classes: int
    width: int = 96
    heads: int = 4
    layers: int = 2  # each of them a P and a D layer with an MLP each
    edge_features: int | None = None  # None: edges have the mean of their ends
    max_edges: int | None = None  # gates of nodes, for so many edges; None: gates of edges
    mlp_factor: int = 4  # inner width of the MLPs over the width, rounded up to a multiple of 64
    norm_epsilon: float = 1e-5
    method: Method = "auto"

    def __post_init__(self) -> None:
        at_least(self, 1, "features", "classes", "layers", "mlp_factor")
        multiple_of(self, "heads", "width")
        if self.width % 2:
            raise ValueError(f"GraphClassifierConfig: width must be even, got {self.width}.")
        if self.max_edges is not None and self.edge_features is not None:
            raise ValueError(
                "GraphClassifierConfig: edge_features are read by gates of edges only; leave out"
                " max_edges."
            )

    def layer(self, mode: Mode) -> PLSTMGraphConfig:
        """One of its pLSTM layers."""
        return PLSTMGraphConfig(
            width=self.width,
            heads=self.heads,
            key_width=self.width // self.heads,
            value_width=self.width // self.heads,
            mode=mode,
            max_edges=self.max_edges,
            edge_width=self.width if self.max_edges is None else None,
            bias=self.max_edges is None,
            norm_epsilon=self.norm_epsilon,
            method=self.method,
        )

    @property
    def mlp_width(self) -> int:
        """Inner width e of the MLPs."""
        return -(-self.mlp_factor * self.width // 64) * 64

    def build(self, *, rngs: nnx.Rngs) -> "GraphClassifier":
        """A freshly initialised model."""
        return GraphClassifier(self, rngs=rngs)


class GraphBlock(nnx.Module):
    """x = x + mixer(norm(x)), then x = x + W_out gelu(W_in norm(x))."""

    def __init__(self, config: GraphClassifierConfig, mode: Mode, *, rngs: nnx.Rngs):
        width, inner = config.width, config.mlp_width
        self.mixer_norm = RMSNorm(width, epsilon=config.norm_epsilon)
        self.mixer = PLSTMGraph(config.layer(mode), rngs=rngs)
        self.mlp_norm = RMSNorm(width, epsilon=config.norm_epsilon)
        self.up = _linear(width, inner, ("embed", "mlp"), rngs)
        self.down = _linear(inner, width, ("mlp", "embed"), rngs)

    def __call__(self, x: Array, dags: DagBatch, edges: Array | None) -> Array:
        """Maps (b nodes d) to (b nodes d)."""
        x = x + self.mixer(self.mixer_norm(x), dags, edges).astype(x.dtype)
        hidden = jax.nn.gelu(self.up(self.mlp_norm(x)), approximate=False)
        return constrain(x + self.down(hidden).astype(x.dtype), "batch", None, None)


class GraphLayer(nnx.Module):
    """A block that runs in P mode and one that runs in D mode."""

    def __init__(self, config: GraphClassifierConfig, *, rngs: nnx.Rngs):
        self.p = GraphBlock(config, "P", rngs=rngs)
        self.d = GraphBlock(config, "D", rngs=rngs)


class GraphClassifier(nnx.Module):
    """The model. It reads a graph as a whole and therefore carries no state."""

    def __init__(self, config: GraphClassifierConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        self.encoder = _linear(config.features, width, (None, "embed"), rngs)
        self.edge_encoder = (
            _linear(config.edge_features, width, (None, "embed"), rngs)
            if config.edge_features is not None
            else None
        )
        keys = jax.random.split(rngs.params(), config.layers)
        self.layers = jax.vmap(lambda key: GraphLayer(config, rngs=nnx.Rngs(key)))(keys)
        self.hidden = _linear(width, width, ("embed", "mlp"), rngs)
        self.out = _linear(width, config.classes, ("mlp", None), rngs)

    def __call__(self, inputs: GraphInputs) -> Array:
        """Scores the classes of a batch from `graph_inputs`: logits (b classes), float32."""
        forward = jax.tree.map(lambda leaf: leaf[:, 0], inputs.p)
        nodes = inputs.nodes.shape[1]
        is_edge = forward.is_edge.astype(jnp.float32)
        neighbours = sum_at(forward.tails, is_edge, nodes) + sum_at(forward.heads, is_edge, nodes)
        x = self.encoder(inputs.nodes)
        x = x + _sinusoids(neighbours, self.config.width).astype(x.dtype)
        first, given = x, None
        if self.edge_encoder is not None:
            if inputs.edges is None:
                raise ValueError("GraphClassifier: the model reads features of edges, got none.")
            given = self.edge_encoder(inputs.edges)

        def features_of_edges(dags: DagBatch) -> Array | None:
            if self.config.max_edges is not None:
                return None
            if given is not None:
                return take(given, dags.edge_ids)
            return (take(first, dags.tails) + take(first, dags.heads)) / 2

        def body(x: Array, inner: tuple[GraphLayer, Array]) -> tuple[Array, None]:
            layer, way = inner
            for block, both_ways in ((layer.p, inputs.p), (layer.d, inputs.d)):
                dags = jax.tree.map(lambda leaf: leaf[:, way], both_ways)
                x = block(x, dags, features_of_edges(dags))
            return x, None

        ways = jnp.arange(self.config.layers, dtype=jnp.int32) % 2
        with jax.named_scope("layers"):
            x, _ = remat_scan(body, x, (self.layers, ways))
        with jax.named_scope("head"):
            total = jnp.sum(jnp.where(forward.is_node[..., None], x, 0), axis=1, dtype=jnp.float32)
            count = jnp.sum(forward.is_node, axis=1, dtype=jnp.float32)
            y = jax.nn.relu(self.hidden(total / count[:, None]))
            return self.out(y).astype(jnp.float32)


def _linear(
    inputs: int, outputs: int, axes: tuple[str | None, str | None], rngs: nnx.Rngs
) -> Linear:
    return Linear(inputs, outputs, init=small(inputs), axes=axes, bias=True, rngs=rngs)


def _sinusoids(count: Array, width: int) -> Array:
    """sin and cos in turns of a count (b nodes) at wave lengths up to 10000: (b nodes d)."""
    rates = LONGEST_WAVE ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = count[..., None] * rates[None, None]
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*count.shape, width)


MUTAG = GraphClassifierConfig(features=7, classes=2)
"""Mutagenic compounds, 188 graphs, of the TUDatasets; width, heads and layers as published."""

NCI1 = GraphClassifierConfig(features=37, classes=2)
"""Compounds active against lung cancer, 4110 graphs."""

PROTEINS = GraphClassifierConfig(features=4, classes=2)
"""Enzymes or not, 1113 graphs, with an attribute of nodes beside their labels."""

PTC_FM = GraphClassifierConfig(features=18, classes=2)
"""Compounds carcinogenic to female mice, 349 graphs."""
