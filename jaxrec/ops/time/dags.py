"""Directed acyclic graphs as padded arrays: their edges in topological order, and which edge passes
its state on to which.

States live on edges. What passes from the edge (u, v) to the edge (v, w) is a pair of edges, an
edge of the line graph. In P mode every such pair exists. In D mode pairs are left out until no two
edges are joined by more than one path (the line graph becomes a multitree): at each node the
incoming edges are taken in topological order, and one passes nothing on if some edge that reaches
it also reaches one that was taken before it.

An edge waits for those that pass a state to it. Edges are numbered as a first-in-first-out queue
lets them go: first those that wait for none, by their tails, then those that the first of them was
the last to hold up, and so on.

Pöppel et al., pLSTM: parallelizable linear source transition mark networks (2025),
arXiv:2506.11997, section 3 and appendix.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jax import Array

Mode = Literal["P", "D"]

ROUND_COST = 16
"""What one more round is taken to cost, in pairs of edges that could be worked on instead: a weight
between few wide rounds and many narrow ones that changes no result.
"""


class Dag(NamedTuple):
    """One graph, in NumPy, unpadded."""

    nodes: int
    tails: np.ndarray  # int32 (edges): the node each edge leaves, edges in topological order
    heads: np.ndarray  # int32 (edges): the node it enters
    edge_ids: np.ndarray  # int32 (edges): its place in the list that the graph was made from
    out_places: np.ndarray  # int32 (edges): its place among the edges that leave its tail
    in_places: np.ndarray  # int32 (edges): its place among the edges that enter its head
    origins: np.ndarray  # int32 (pairs): the edge that passes its state on
    targets: np.ndarray  # int32 (pairs): the edge that takes it
    rounds: np.ndarray  # int32 (pairs): pairs of a round wait for those of earlier ones only


class DagShape(NamedTuple):
    """Sizes to which graphs are padded; equal ones are computed by one compiled program."""

    nodes: int
    edges: int
    pairs: int
    rounds: int
    width: int  # pairs of a round


class DagBatch(NamedTuple):
    """Graphs padded to one shape, in NumPy as they are made; indices are int32.

    Padding has no neighbours: its indices lie behind the last node, edge or pair.
    """

    is_node: Array  # bool (b nodes): not padding
    is_edge: Array  # bool (b edges)
    tails: Array  # (b edges)
    heads: Array  # (b edges)
    edge_ids: Array  # (b edges)
    out_places: Array  # (b edges)
    in_places: Array  # (b edges)
    origins: Array  # (b pairs)
    targets: Array  # (b pairs)
    schedule: Array  # (b rounds width): the pairs of each round


def dag(
    nodes: int,
    edges: np.ndarray | Sequence[tuple[int, int]],
    *,
    mode: Mode = "P",
    directed: bool = False,
    reverse: bool = False,
) -> Dag:
    """Orders the edges of a graph, and finds which passes its state on to which.

    Args:
      nodes: their number, >= 1.
      edges: int (edges 2). Undirected ones run from the lower to the higher node, so that the order
        of the nodes is part of the graph.
      mode: "P" or "D", see above.
      directed: edges run from their first to their second node, whatever the nodes' order.
      reverse: turn every edge round, and with them the order of nodes and edges.

    Raises:
      ValueError: an edge is a loop, occurs twice, or names no node; directed ones form a cycle; the
        mode is unknown.
    """
    pairs = _checked(nodes, edges, mode)
    if not directed:
        pairs = np.sort(pairs, axis=1)
    if len(np.unique(pairs, axis=0)) < len(pairs):
        raise ValueError("dag: an edge occurs twice; a graph has at most one between two nodes.")
    ids = np.arange(len(pairs))
    if reverse:
        pairs, ids = nodes - 1 - pairs[::-1, ::-1], ids[::-1]
    order = np.argsort(pairs[:, 0], kind="stable")
    ends, ids = pairs[order].tolist(), ids[order]
    leaving: list[list[int]] = [[] for _ in range(nodes)]
    entering: list[list[int]] = [[] for _ in range(nodes)]
    out_places, in_places = [], []
    for edge, (tail, head) in enumerate(ends):
        out_places.append(len(leaving[tail]))
        in_places.append(len(entering[head]))
        leaving[tail].append(edge)
        entering[head].append(edge)
    listed = _as_met(ends, leaving)
    topological = _queued(ends, listed, leaving, entering)
    if len(topological) < len(ends):
        raise ValueError("dag: the edges form a cycle; only acyclic graphs have an order.")
    if mode == "D":
        entering = _pruned(ends, topological, leaving, entering)
        topological = _queued(ends, listed, leaving, entering)
    kept = {edge for list_ in entering for edge in list_}
    joined = [(a, b) for a in listed if a in kept for b in leaving[ends[a][1]]]
    number = np.empty(len(ends), np.int32)
    number[topological] = np.arange(len(ends))
    level = [0] * len(ends)
    for edge in topological:
        level[edge] = 1 + max((level[a] for a in entering[ends[edge][0]]), default=-1)
    by_number = np.array(ends, np.int32).reshape(-1, 2)[topological]
    if reverse:
        by_number = nodes - 1 - by_number
    a, b = np.array(joined, np.int64).reshape(-1, 2).T
    return Dag(
        nodes,
        by_number[:, 0],
        by_number[:, 1],
        ids[topological].astype(np.int32),
        np.array(out_places, np.int32)[topological],
        np.array(in_places, np.int32)[topological],
        number[a],
        number[b],
        np.array(level, np.int32)[a],
    )


def shape_of(dags: Sequence[Dag], width: int | None = None) -> DagShape:
    """The smallest shape that each of the graphs fits into; width None: the one that costs least.

    Raises:
      ValueError: there is no graph.
    """
    if not dags:
        raise ValueError("shape_of: needs at least one graph.")
    sizes = [np.bincount(graph.rounds) for graph in dags]
    largest = max((int(size.max(initial=0)) for size in sizes), default=0)
    widths = [width] if width else [2**i for i in range(max(largest - 1, 0).bit_length() + 1)]
    needed = {w: max(int(np.sum(-(-size // w))) for size in sizes) for w in widths}
    width = min(widths, key=lambda w: needed[w] * (w + ROUND_COST))
    return DagShape(
        max(graph.nodes for graph in dags),
        max(len(graph.tails) for graph in dags),
        max(len(graph.origins) for graph in dags),
        needed[width],
        width,
    )


def dag_batch(dags: Sequence[Dag], shape: DagShape | None = None) -> DagBatch:
    """Pads graphs to one shape.

    Args:
      dags: at least one.
      shape: what to pad to; None: the smallest that fits.

    Raises:
      ValueError: a graph is larger than the shape, or there is none.
    """
    shape = shape_of(dags) if shape is None else shape
    for i, graph in enumerate(dags):
        for name, size, room in zip(
            DagShape._fields, shape_of([graph], shape.width), shape, strict=True
        ):
            if size > room:
                raise ValueError(
                    f"dag_batch: graph {i} has {size} {name}, but is to be padded to {room}."
                )

    def padded(field: str, room: int, fill: int) -> np.ndarray:
        rows = [getattr(graph, field) for graph in dags]
        return np.stack([np.pad(x, (0, room - len(x)), constant_values=fill) for x in rows])

    leaves: list[Any] = [
        np.stack([np.arange(shape.nodes) < graph.nodes for graph in dags]),
        np.stack([np.arange(shape.edges) < len(graph.tails) for graph in dags]),
        *(padded(name, shape.edges, shape.nodes) for name in ("tails", "heads")),
        *(padded(name, shape.edges, 0) for name in ("edge_ids", "out_places", "in_places")),
        *(padded(name, shape.pairs, shape.edges) for name in ("origins", "targets")),
        np.stack([_scheduled(graph, shape) for graph in dags]),
    ]
    return DagBatch(*leaves)


def _checked(nodes: int, edges: np.ndarray | Sequence[tuple[int, int]], mode: Mode) -> np.ndarray:
    if mode not in get_args(Mode):
        raise ValueError(f"dag: mode must be P or D, got {mode!r}.")
    if nodes < 1:
        raise ValueError(f"dag: needs at least one node, got {nodes}.")
    ends = np.asarray(edges if len(edges) else np.zeros((0, 2), np.int64))
    if ends.ndim != 2 or ends.shape[1] != 2 or not np.issubdtype(ends.dtype, np.integer):
        raise ValueError(f"dag: edges must be int (edges 2), got {ends.dtype} {ends.shape}.")
    wrong = (ends < 0) | (ends >= nodes)
    if wrong.any():
        raise ValueError(
            f"dag: nodes are 0 .. {nodes - 1}, but an edge names {int(ends[wrong][0])}."
        )
    loops = ends[ends[:, 0] == ends[:, 1]]
    if len(loops):
        raise ValueError(f"dag: node {int(loops[0, 0])} has an edge to itself.")
    return ends.astype(np.int64)


def _as_met(ends: list[list[int]], leaving: list[list[int]]) -> list[int]:
    """Edges in the order in which a walk meets them that looks, from each edge, at those which
    leave its head.
    """
    met = dict.fromkeys(
        met for edge, (_, head) in enumerate(ends) for met in (edge, *leaving[head])
    )
    return list(met)


def _queued(
    ends: list[list[int]],
    listed: list[int],
    leaving: list[list[int]],
    entering: list[list[int]],
) -> list[int]:
    """Edges in the order of the queue, without those that wait for themselves."""
    waiting = [len(edges) for edges in entering]
    passes_on = [False] * len(ends)
    for edges in entering:
        for edge in edges:
            passes_on[edge] = True
    queue = deque(edge for edge in listed if not waiting[ends[edge][0]])
    gone = []
    while queue:
        edge = queue.popleft()
        gone.append(edge)
        node = ends[edge][1]
        if passes_on[edge]:
            waiting[node] -= 1
            if not waiting[node]:
                queue.extend(leaving[node])
    return gone


def _pruned(
    ends: list[list[int]],
    topological: list[int],
    leaving: list[list[int]],
    entering: list[list[int]],
) -> list[list[int]]:
    """The incoming edges of each node that pass their state on in D mode."""
    place = {edge: i for i, edge in enumerate(topological)}
    reached_by = [0] * len(ends)  # bit a: edge a reaches this one
    kept: list[list[int]] = [[] for _ in entering]
    for node in dict.fromkeys(ends[edge][0] for edge in topological):
        together = 0
        for edge in sorted(entering[node], key=place.__getitem__):
            if not reached_by[edge] & together:
                kept[node].append(edge)
                together |= reached_by[edge] | 1 << edge
        for edge in leaving[node]:
            reached_by[edge] = together
    return kept


def _scheduled(graph: Dag, shape: DagShape) -> np.ndarray:
    """Pairs (rounds width) of one graph; what is left over holds shape.pairs."""
    table = np.full((shape.rounds, shape.width), shape.pairs, np.int32)
    order = np.argsort(graph.rounds, kind="stable")
    sizes = np.bincount(graph.rounds)
    rows = -(-sizes // shape.width)
    within = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    row = np.repeat(np.cumsum(rows) - rows, sizes) + within // shape.width
    table[row, within % shape.width] = order
    return table
