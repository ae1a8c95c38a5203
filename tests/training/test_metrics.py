"""Metrics are valid JSON lines whatever the numbers are, and survive a crash."""

import json
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.training import metrics
from jaxrec.training.metrics import MetricsLog


def test_lines_are_complete_as_soon_as_they_are_logged(tmp_path):
    with MetricsLog(tmp_path / "run") as log:
        log.log(1, {"loss": jnp.float32(2.5), "depth": np.int64(4), "name": "x", "none": None})
        log.log(2, {"by_depth": {1: 3.0, 2: np.float32(1.5)}, "list": (1, 2)}, kind="eval")
        first, second = metrics.read(log.path)
    assert {
        "step": 1,
        "kind": "train",
        "loss": 2.5,
        "depth": 4,
        "name": "x",
        "none": None,
    }.items() <= first.items()
    assert second["kind"] == "eval"
    assert second["by_depth"] == {"1": 3.0, "2": 1.5}
    assert second["list"] == [1, 2]


def test_numbers_that_json_cannot_hold(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.log(1, {"a": float("nan"), "b": jnp.inf, "c": [np.float32("-inf")]})

    def refuse(name):
        raise AssertionError(name)

    line = json.loads(log.path.read_text(), parse_constant=refuse)
    assert (line["a"], line["b"], line["c"]) == ("nan", "inf", ["-inf"])
    (values,) = metrics.read(log.path)
    assert math.isnan(values["a"])
    assert values["b"] == math.inf
    assert values["c"] == [-math.inf]


def test_logging_again_appends(tmp_path):
    for step in (1, 2):
        with MetricsLog(tmp_path) as log:
            log.log(step, {})
    assert [line["step"] for line in metrics.read(log.path)] == [1, 2]


def test_after_a_resume_later_lines_are_gone(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.log(step, {"loss": float(step)})
    with log.path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    assert len(metrics.read(log.path)) == 5
    metrics.truncate_after(log.path, 3)
    with MetricsLog(tmp_path) as log:
        log.log(4, {"loss": 0.0})
    assert [(line["step"], line["loss"]) for line in metrics.read(log.path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 0.0),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_nothing_to_truncate(tmp_path):
    metrics.truncate_after(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    message = r"Could not write to .*metrics.jsonl \(No space left on device\). Make room"
    with pytest.raises(UserError, match=message), MetricsLog(tmp_path) as log:
        log.log(1, {})


class Recorder:
    """Stands for an event writer or a run."""

    def __init__(self, *args, **kwargs):
        self.made, self.logged, self.closed = (args, kwargs), [], False

    def add_scalar(self, name, value, step):
        self.logged.append((step, name, value))

    def log(self, values, step):
        self.logged.extend((step, name, value) for name, value in values.items())

    def close(self):
        self.closed = True

    finish = close


@pytest.mark.parametrize("extra", ["tensorboard", "wandb"])
def test_curves_go_to_the_extras(tmp_path, monkeypatch, extra):
    made = []

    class Module:
        @staticmethod
        def init(**options):
            made.append(Recorder(**options))
            return made[-1]

        @staticmethod
        def SummaryWriter(folder):
            made.append(Recorder(folder))
            return made[-1]

    monkeypatch.setitem(sys.modules, {"tensorboard": "tensorboardX"}.get(extra, extra), Module)
    options = {"tensorboard": True} if extra == "tensorboard" else {"wandb": "project"}
    with MetricsLog(tmp_path, **options) as log:
        log.log(3, {"loss": jnp.float32(1.5), "text": "x", "depths": {1: 2.0}})
    (writer,) = made
    assert writer.logged == [(3, "train/loss", 1.5)]
    assert writer.closed


def test_a_wandb_run_is_continued_by_its_own_folder_only(tmp_path, monkeypatch):
    made = []

    class Module:
        @staticmethod
        def init(**options):
            made.append(options)
            return Recorder()

    monkeypatch.setitem(sys.modules, "wandb", Module)
    for folder in ("one/run", "one/run", "two/run"):
        MetricsLog(tmp_path / folder, wandb="project").close()
    names, ids = ([options[field] for options in made] for field in ("name", "id"))
    assert names == ["run"] * 3
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    "options, module, extra",
    [({"tensorboard": True}, "tensorboardX", "tensorboard"), ({"wandb": "p"}, "wandb", "wandb")],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, options, module, extra):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(UserError, match=rf'pip install "jaxrec\[{extra}\]"'):
        MetricsLog(tmp_path, **options)
    assert not list(tmp_path.iterdir())
