"""The pLSTM layer on graphs: queries, keys and values of nodes, gates of edges and pairs of edges.

    y = W_out norm(dag_scan(W_q x, W_k x, W_v x, s, t, m, d))

with s, m, d through a sigmoid. Gates come from nodes alone, or from nodes and edges:

    node   s_e = S x_u [place of e],  m_e = M x_w [place of e],  t_{a e} = T x_u [places of a, e]
    edge   s_e = S [x_u, z_e],  m_e = M [x_w, z_e],  t_{a e} = T [z_a, z_e, x_u]

for an edge e from u to w and a pair a -> e that meets at u, with features x of nodes and z of
edges. In D mode t goes through tanh. In P mode it is divided by 1/2 + a sum of |t|, so that states
do not grow: with gates of nodes the sum over all places of e, with gates of edges over all pairs
that share e.

A place numbers the edges at a node, of which gates of nodes know a fixed number: an edge is counted
among those that leave u where it is gated as leaving, and among those that enter w where it is
gated as entering. The original counts it at its other end, and gates of edges read there the node
that a comes from instead of x_u. It is followed with `ends="far"`.

Pöppel et al., pLSTM: parallelizable linear source transition mark networks (2025),
arXiv:2506.11997, section 3 and appendix.
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxrec.config import at_least, one_of
from jaxrec.layers.linear import Linear
from jaxrec.layers.norm import RMSNorm
from jaxrec.ops.time.dag_scan import Method, dag_scan, sum_at, take
from jaxrec.ops.time.dags import DagBatch, Mode

Ends = Literal["near", "far"]

GATE_BIAS = -5.0  # of source, mark and direct: gates begin nearly closed
EDGE_TRANSITION_STDDEV = 10.0
P_OFFSET = 0.5  # what P mode adds to the sum of |t|


@dataclasses.dataclass(frozen=True, kw_only=True)
class PLSTMGraphConfig:
    """Sizes of a layer; gates of nodes if it has `max_edges`, of edges if it has `edge_width`."""

    width: int  # features of a node
    heads: int
    key_width: int  # of a head
    value_width: int  # of a head
    mode: Mode = "P"  # must be that of the graphs
    max_edges: int | None = None  # most edges that enter a node, or leave it
    edge_width: int | None = None  # features of an edge
    ends: Ends = "near"  # "far": as the original does it, see above
    bias: bool = False  # of queries, keys, values and the output
    out: bool = True  # False: the normalised heads are the output
    norm_scale: bool = True
    norm_bias: bool = False
    norm_epsilon: float = 1e-5
    method: Method = "auto"

    def __post_init__(self) -> None:
        at_least(self, 1, "width", "heads", "key_width", "value_width")
        one_of(self, "mode", get_args(Mode))
        one_of(self, "ends", get_args(Ends))
        one_of(self, "method", get_args(Method))
        if (self.max_edges is None) == (self.edge_width is None):
            raise ValueError(
                "PLSTMGraphConfig: needs either max_edges, for gates of nodes, or edge_width, for"
                f" gates of edges; got {self.max_edges} and {self.edge_width}."
            )
        at_least(self, 1, "max_edges" if self.edge_width is None else "edge_width")

    def build(self, *, rngs: nnx.Rngs) -> "PLSTMGraph":
        """A freshly initialised layer."""
        return PLSTMGraph(self, rngs=rngs)


def small(inputs: int) -> Any:
    """Normal with variance 2 / (5 inputs)."""
    return jax.nn.initializers.normal((2 / (5 * inputs)) ** 0.5)


class PLSTMGraph(nnx.Module):
    """The layer. It reads graphs as a whole and therefore carries no state."""

    def __init__(self, config: PLSTMGraphConfig, *, rngs: nnx.Rngs):
        self.config = config
        keys, values = ((config.heads, n) for n in (config.key_width, config.value_width))

        def projection(outputs: tuple[int, int]) -> Linear:
            axes, init = ("embed", "heads", "head"), small(config.width)
            return Linear(config.width, outputs, init=init, axes=axes, bias=config.bias, rngs=rngs)

        self.query, self.key, self.value = (projection(n) for n in (keys, keys, values))
        gates = NodeGates if config.edge_width is None else EdgeGates
        self.gates: NodeGates | EdgeGates = gates(config, rngs=rngs)
        inner = config.heads * config.value_width
        self.norm = RMSNorm(
            inner,
            epsilon=config.norm_epsilon,
            groups=config.heads,
            scale=config.norm_scale,
            bias=config.norm_bias,
        )
        self.out = (
            Linear(
                inner,
                config.width,
                init=small(inner),
                axes=("heads", "embed"),
                bias=config.bias,
                rngs=rngs,
            )
            if config.out
            else None
        )

    def __call__(self, x: Array, dags: DagBatch, edges: Array | None = None) -> Array:
        """Maps nodes to nodes.

        Args:
          x: features of nodes (b nodes d), finite at padding too.
          dags: the graphs, from `dag_batch`, in the mode of the layer.
          edges: features of edges (b edges edge_width), in the order of `dags`; for gates of edges
            only.

        Returns:
          (b nodes d), or (b nodes h*v) without the output map; what comes out at padding means
          nothing.

        Raises:
          ValueError: features of edges are missing, not asked for, or misshapen; or, for gates of
            nodes, a node has more edges than max_edges. Where `dags` is traced, such a node makes
            NaN instead.
        """
        width = self.config.edge_width
        expected = None if width is None else (*dags.is_edge.shape, width)
        if (None if edges is None else edges.shape) != expected:
            raise ValueError(
                f"PLSTMGraph: features of edges must be (b edges edge_width) = {expected}, got"
                f" {None if edges is None else edges.shape}."
            )
        with jax.named_scope("plstm_graph"):
            gates = self.gates(x, dags, *(() if edges is None else (edges,)))
            y = dag_scan(
                self.query(x),
                self.key(x),
                self.value(x),
                *gates,
                dags,
                method=self.config.method,
            )
            y = self.norm(y.reshape(*y.shape[:2], -1))
            return y if self.out is None else self.out(y)


class NodeGates(nnx.Module):
    """Gates that a node gives by itself to each of its edges."""

    def __init__(self, config: PLSTMGraphConfig, *, rngs: nnx.Rngs):
        places, heads = config.max_edges, config.heads
        assert places is not None
        self.source = _gate(config.width, (heads, places), rngs)
        self.mark = _gate(config.width, (heads, places), rngs)
        self.direct = _gate(config.width, (heads,), rngs)
        self.transition = Linear(
            config.width,
            (heads, places, places),
            init=jax.nn.initializers.zeros,
            axes=("embed", "heads", None, None),
            bias=True,
            bias_init=_identities,
            rngs=rngs,
        )
        self.config = config

    def __call__(self, x: Array, dags: DagBatch) -> tuple[Array, Array, Array, Array]:
        """Source (b edges h), transition (b pairs h), mark (b edges h), direct (b nodes h)."""
        places = self.config.max_edges
        assert places is not None
        leaving, entering = dags.out_places, dags.in_places
        if self.config.ends == "far":
            leaving, entering = entering, leaving
        _refuse_many_edges(dags, places)
        batch, nodes = x.shape[:2]

        def at(gates: Array, node: Array, *of: Array) -> Array:
            """Gates (b nodes h places...) at a node and places, each (b j): (b j h); NaN where
            there is no such place.
            """
            index, there = node, node < nodes
            for place in of:
                index, there = index * places + place, there & (place < places)
            rows = jnp.moveaxis(gates, 2, -1).reshape(batch, -1, gates.shape[2])
            return take(rows, jnp.where(there, index, rows.shape[1]), jnp.nan)

        source, mark = (_open(gate(x)) for gate in (self.source, self.mark))
        t = self.transition(x).astype(jnp.float32)
        if self.config.mode == "P":
            incoming = sum_at(dags.heads, dags.is_edge.astype(jnp.int32), nodes)
            enters = jnp.arange(places, dtype=jnp.int32)[None, None] < incoming[..., None]
            t = jnp.where(enters[:, :, None, :, None], t, 0.0)
            t = t / (P_OFFSET + jnp.sum(jnp.abs(t), axis=-1, keepdims=True))
        else:
            t = jnp.tanh(t)
        origin_place, target_place = take(entering, dags.origins), take(leaving, dags.targets)
        between = take(dags.heads, dags.origins, nodes)
        return (
            at(source, dags.tails, leaving),
            at(t, between, origin_place, target_place),
            at(mark, dags.heads, entering),
            _open(self.direct(x)),
        )


class EdgeGates(nnx.Module):
    """Gates of nodes and edges together."""

    def __init__(self, config: PLSTMGraphConfig, *, rngs: nnx.Rngs):
        width, edge = config.width, config.edge_width
        assert edge is not None
        self.source = _gate(width + edge, (config.heads,), rngs)
        self.mark = _gate(width + edge, (config.heads,), rngs)
        self.direct = _gate(width, (config.heads,), rngs)
        self.transition = Linear(
            2 * edge + width,
            config.heads,
            init=jax.nn.initializers.zeros,
            axes=("embed", "heads"),
            bias=True,
            bias_init=jax.nn.initializers.normal(EDGE_TRANSITION_STDDEV),
            rngs=rngs,
        )
        self.config = config

    def __call__(self, x: Array, dags: DagBatch, edges: Array) -> tuple[Array, Array, Array, Array]:
        """Source (b edges h), transition (b pairs h), mark (b edges h), direct (b nodes h)."""
        every = jnp.broadcast_to(jnp.arange(edges.shape[1], dtype=jnp.int32)[None], edges.shape[:2])
        end = dags.tails if self.config.ends == "far" else dags.heads
        node = take(end, dags.origins, x.shape[1])
        t = _of_parts(
            self.transition, (edges, dags.origins), (edges, dags.targets), (x, node)
        ).astype(jnp.float32)
        if self.config.mode == "P":
            total = sum_at(dags.targets, jnp.abs(t), edges.shape[1])
            t = t / (P_OFFSET + take(total, dags.targets))
        else:
            t = jnp.tanh(t)
        return (
            _open(_of_parts(self.source, (x, dags.tails), (edges, every))),
            t,
            _open(_of_parts(self.mark, (x, dags.heads), (edges, every))),
            _open(self.direct(x)),
        )


def _gate(inputs: int, outputs: tuple[int, ...], rngs: nnx.Rngs) -> Linear:
    """A map that begins as the same closed gate everywhere."""
    axes = ("embed", "heads", None)[: 1 + len(outputs)]
    zeros, closed = jax.nn.initializers.zeros, jax.nn.initializers.constant(GATE_BIAS)
    return Linear(inputs, outputs, init=zeros, axes=axes, bias=True, bias_init=closed, rngs=rngs)


def _identities(
    key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None
) -> Array:
    """An identity (places places) for each head."""
    return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype)[None], shape)


def _open(x: Array) -> Array:
    return jax.nn.sigmoid(x.astype(jnp.float32))


def _of_parts(linear: Linear, *parts: tuple[Array, Array]) -> Array:
    """The map of several features side by side, each of some rows (b m f) at an index (b j): every
    row is mapped once, before it is taken.
    """
    kernel = linear.kernel[...]
    ends = [0]
    for rows, _ in parts:
        ends.append(ends[-1] + rows.shape[-1])
    mapped = [
        take(jnp.tensordot(rows.astype(kernel.dtype), kernel[begin:end], axes=1), index)
        for (rows, index), begin, end in zip(parts, ends[:-1], ends[1:], strict=True)
    ]
    assert linear.bias is not None
    return sum(mapped[1:], mapped[0]) + linear.bias[...].astype(kernel.dtype)[None, None]


def _refuse_many_edges(dags: DagBatch, places: int) -> None:
    """Raises if a node has more edges than places, where that can be known."""
    if isinstance(dags.out_places, jax.core.Tracer) or isinstance(dags.in_places, jax.core.Tracer):
        return
    for what, place in (("leave", dags.out_places), ("enter", dags.in_places)):
        most = int(place.max(initial=-1)) + 1
        if most > places:
            raise ValueError(
                f"PLSTMGraph: {most} edges {what} a node, but max_edges is {places}; choose a"
                " larger one, or gates of edges, which have no limit."
            )
