"""pLSTM on graphs against its original: the operator with all gradients, graph layers, and the
pictures of arrows that point or do not.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec import convert
from jaxrec.convert import plstm_graph
from jaxrec.ops.time import dag, dag_batch, dag_scan
from jaxrec.training.data.arrows import ArrowsConfig, arrow, pictures
from tests.golden.harness import Case, cases, check_round_trip

SYSTEM = "plstm_graph"


def found(belongs):
    """The folders whose configuration is of some kind."""
    folders = cases("plstm")
    return [f for f in folders if belongs(json.loads((f / "config.json").read_text()))]


LAYERS = found(lambda config: config.get("class_name") in plstm_graph.CLASSES)
OPERATORS = found(lambda config: config.get("op") == "plstm_graph")
PICTURES = found(lambda config: "arrow_length_min" in config)


def each(folders):
    return pytest.mark.parametrize("folder", folders, ids=lambda folder: folder.name)


def ends(graph):
    return np.stack([graph.tails, graph.heads], axis=1)


def nodes_first(x):
    """(h nodes ...) -> (1 nodes h ...)."""
    return jnp.swapaxes(jnp.asarray(x), 0, 1)[None]


@each(OPERATORS)
@pytest.mark.parametrize("method", ["states", "paths"])
def test_operator_and_gradients(folder, method):
    golden = Case(folder)
    graph = dag(
        golden.config["num_nodes"], golden["graph_edges_undirected"], mode=golden.config["mode"]
    )
    golden.check("dag_edges_topo", ends(graph))
    golden.check("line_edges", np.stack([graph.origins, graph.targets], axis=1))
    args = [nodes_first(golden[f"in_{name}"]) for name in "qkvstmd"]
    dags, weights = dag_batch([graph]), nodes_first(golden["cot_out"])

    @jax.jit
    def run(*args):
        y, gradient = jax.vjp(lambda *args: dag_scan(*args, dags, method=method), *args)
        return y, gradient(weights)

    y, gradients = run(*args)
    golden.check("out", jnp.swapaxes(y[0], 0, 1))
    for name, gradient in zip("qkvstmd", gradients, strict=True):
        golden.check(f"grad_{name}", jnp.swapaxes(gradient[0], 0, 1))
    golden.assert_all_looked_at()


@each(LAYERS)
def test_layer(folder):
    golden = Case(folder)
    layer = convert.load(SYSTEM, golden.folder)
    x = golden["in_node_features"]
    graph = dag(x.shape[0], golden["graph_edges_undirected"], mode=layer.config.mode)
    golden.check("dag_edges_topo", ends(graph))
    pairs = [ends(graph)[graph.origins], ends(graph)[graph.targets]]
    golden.check("line_edges_endpoints", np.concatenate(pairs, axis=1))
    edges = []
    if layer.config.edge_width is not None:
        edges = [golden["in_edge_features"][graph.edge_ids][None]]
    dags = dag_batch([graph])
    y = jax.jit(lambda layer, x: layer(x, dags, *edges))(layer, x[None])
    golden.check("out", y[0])
    golden.assert_all_looked_at()


@each(LAYERS)
def test_the_table_round_trips(folder, tmp_path):
    golden = Case(folder)
    golden.system = SYSTEM  # the folder is named after the whole family
    check_round_trip(golden, convert.load(SYSTEM, golden.folder), tmp_path)


@each(PICTURES)
def test_arrows(folder):
    golden = Case(folder)
    options = {name: x for name, x in golden.config.items() if name != "n_samples"}
    config = ArrowsConfig(**options | {"image_size": tuple(options["image_size"])})
    count = len(golden["labels"])
    drawn = pictures(config, 0, count)
    golden.check("labels", drawn.labels)
    numbers = np.array([arrow(config, i) for i in range(count)])
    np.testing.assert_array_equal(numbers.astype(np.float32), golden["params"])
    # The original draws with a library whose rounding no other follows; its README allows 1 %.
    differ = np.any(drawn.images != golden["images"], axis=-1)
    assert np.all(np.mean(differ, axis=(1, 2)) < 0.01)
    golden.assert_all_looked_at()
