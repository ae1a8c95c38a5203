"""Models trained for equal time: how many steps each is given, and what is reported."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from jaxrec.training import comparison
from jaxrec.training.config import TrainConfig

SPEED = {"slow": 100.0, "fast": 400.0, "stopped": 1.0}  # tokens per second


@pytest.fixture
def asked(monkeypatch):
    """In place of training: runs that read at a known speed, and the steps asked for."""
    asked = []

    def train(name, model, config, *, runs, stream):
        asked.append((name, model, config.steps))
        folder = runs / "run"
        folder.mkdir()
        lines = [
            {
                "kind": "train",
                "step": step,
                "tokens_per_second": SPEED[model],
                "bits_per_byte": 8.0 / step,
            }
            for step in range(config.log_every, config.steps + 1, config.log_every)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        return SimpleNamespace(
            run=SimpleNamespace(folder=folder),
            evaluation=None if model == "stopped" else SimpleNamespace(bits_per_byte={1: 2.5}),
            state={"params": {"w": np.zeros((3, 4))}},
            data=SimpleNamespace(provenance={"source": "toy"}),
            stopped_by="SIGINT",
        )

    monkeypatch.setattr(comparison, "train", train)
    return asked


CONFIG = TrainConfig(batch=2, time=50, log_every=2)


def test_each_model_gets_the_steps_that_fit_into_the_time(asked):
    results, curves = comparison.equal_time({"A": "slow", "B": "fast"}, CONFIG, 0.5)
    # 100 tokens a step: 1 and 1/4 second.
    assert [(name, steps) for name, _, steps in asked if name != "short"] == [("A", 30), ("B", 120)]
    assert results["models"]["B"] == {
        "parameters": 12,
        "steps": 120,
        "tokens": 12000,
        "training_seconds": 30.0,
        "bits_per_byte": 2.5,
    }
    assert results["data"] == {"source": "toy"}
    assert curves["A"]["tokens"][:2] == [200, 400] and curves["A"]["seconds"][:2] == [2.0, 4.0]


def test_no_time_is_two_steps(asked):
    comparison.equal_time({"A": "slow"}, CONFIG, 0)
    assert asked == [("A", "slow", 2)]


def test_a_stopped_run_stops_the_comparison(asked):
    with pytest.raises(KeyboardInterrupt, match="SIGINT"):
        comparison.equal_time({"A": "stopped"}, CONFIG, 0)


def test_the_curves_are_drawn(asked, tmp_path):
    _, curves = comparison.equal_time({"A": "slow", "B": "fast"}, CONFIG, 0.5)
    comparison.plot_equal_time(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
