"""pLSTM on graphs: what its states along edges are worth, and the published runs on TUDatasets.

Without arguments: small models on made graphs whose labels are known, once with transitions and
once without, so that a layer sees neighbours only. Writes results.json; with --smoke, tiny models
take a few steps and nothing is written. With --tudataset FOLDER: ten folds as published, printed.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrec.models.plstm_graph import GraphClassifierConfig, GraphOrders
from jaxrec.ops.time import Dag
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data.graphs import classes_of, features_of, made_graphs
from jaxrec.training.data.tudataset import read_tudataset, stratified_folds
from jaxrec.training.graphs import (
    GraphSettings,
    OrderedGraph,
    graph_accuracy,
    ordered,
    train_graph_classifier,
)
from jaxrec.training.runs import versions

HERE = Path(__file__).parent
TASKS = ("longest-path", "reachability", "cycles", "molecules")
FOLDS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny, nothing written")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each made task and model")
    parser.add_argument("--tudataset", type=Path, help="folder of a TUDataset, such as MUTAG")
    parser.add_argument("--folds", type=int, default=FOLDS, help="how many of the ten to run")
    options = parser.parse_args()
    if options.tudataset:
        print(json.dumps(tudataset(options.tudataset, options.folds), indent=2))
        return
    results = made(options.smoke, options.seeds)
    text = json.dumps(results, indent=2)
    print(text)
    if not options.smoke:
        (HERE / "results.json").write_text(text + "\n")


def made(smoke: bool, seeds: int) -> dict[str, Any]:
    """Accuracy on unseen graphs of every task, with and without transitions."""
    tasks, counts, epochs = (TASKS, (800, 200, 400), 25)
    if smoke:
        tasks, counts, epochs, seeds = TASKS[1:2], (8, 4, 4), 1, 1
    width = 8 if smoke else 32
    settings = {
        "batch": 32,
        "warmup_epochs": 1,
        "optimizer": OptimizerConfig(learning_rate=3e-3, weight_decay=0.01, final_fraction=0.02),
    }
    results: dict[str, Any] = {"epochs": epochs, "graphs": counts[0], "seeds": seeds, "tasks": {}}
    for task in tasks:
        config = GraphClassifierConfig(
            features=features_of(task), classes=classes_of(task), width=width, heads=4
        )
        graphs, ends = ordered(made_graphs(task, sum(counts), seed=0)), np.cumsum(counts)
        parts = [graphs[end - n : end] for n, end in zip(counts, ends, strict=True)]
        row: dict[str, Any] = {}
        for name in ("with transitions", "neighbours only"):
            if name == "neighbours only":
                parts = [[without_pairs(one) for one in part] for part in parts]
            began, found = time.perf_counter(), []
            for seed in range(seeds):
                trained = train_graph_classifier(
                    config, parts[0], parts[1], GraphSettings(epochs=epochs, seed=seed, **settings)
                )
                found.append(round(graph_accuracy(trained.model, parts[2]), 4))
            row[name] = {"accuracy": found, "minutes": minutes_since(began)}
            print(task, name, row[name], file=sys.stderr)
        share = np.bincount([one.graph.label for one in parts[2]]).max() / counts[2]
        results["tasks"][task] = row | {"commonest label": round(float(share), 4)}
    results["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(trained.model))
    return results | {"versions": versions()}


def without_pairs(one: OrderedGraph) -> OrderedGraph:
    """No edge passes its state on: every layer sees the neighbours of a node."""

    def cut(dags: tuple[Dag, Dag]) -> tuple[Dag, Dag]:
        none = np.zeros(0, np.int32)
        forward, back = (dag._replace(origins=none, targets=none, rounds=none) for dag in dags)
        return forward, back

    return one._replace(orders=GraphOrders(cut(one.orders.p), cut(one.orders.d)))


def tudataset(folder: Path, count: int) -> dict[str, Any]:
    """The published runs: width 96, 2 layers, 100 epochs, ten folds, of which one is tested on and
    the next chooses the epoch.
    """
    graphs = ordered([graph._replace(edge_features=None) for graph in read_tudataset(folder)])
    labels = [one.graph.label for one in graphs]
    config = GraphClassifierConfig(
        features=graphs[0].graph.features.shape[1], classes=max(labels) + 1
    )
    folds = stratified_folds(labels, FOLDS, seed=42)
    accuracies, began = [], time.perf_counter()
    for i in range(count):
        held_out, test = folds[(i + 1) % FOLDS], folds[i]
        kept = np.setdiff1d(np.arange(len(graphs)), np.concatenate([held_out, test]))
        train, valid, unseen = ([graphs[j] for j in part] for part in (kept, held_out, test))
        trained = train_graph_classifier(config, train, valid, GraphSettings(seed=i))
        accuracies.append(round(graph_accuracy(trained.model, unseen), 4))
        print(f"fold {i}: {accuracies[-1]}", file=sys.stderr)
    return {
        "dataset": folder.name,
        "graphs": len(graphs),
        "accuracies": accuracies,
        "mean": round(float(np.mean(accuracies)), 4),
        "deviation": round(float(np.std(accuracies)), 4),
        "minutes": minutes_since(began),
        "versions": versions(),
    }


def minutes_since(began: float) -> float:
    return round((time.perf_counter() - began) / 60, 2)


if __name__ == "__main__":
    main()
