"""The published runs on ImageNet: their sizes, and that a step of each fits together."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxrec.models.plstm_vision import vision_config
from jaxrec.training import sharding
from jaxrec.training.data.images import Images
from jaxrec.training.images import build_image_steps
from tests.experiments.smoke import EXPERIMENTS

RUN = EXPERIMENTS / "plstm_imagenet" / "run.py"


def module():
    spec = importlib.util.spec_from_file_location("plstm_imagenet_run", RUN)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_gates_begin_by_reading_their_input():
    run = module()
    small = vision_config(width=16, heads=2, layers=1, patch=4, grid=(2, 2), classes=2)
    settings = dataclasses.replace(run.PRETRAINED["T"], batch=2)
    steps = build_image_steps(small, settings, sharding.build_mesh("data=1"), 1)
    before, after = steps.init()["params"], run.drawn_gates(steps)

    def spread(params, *path):
        for name in path:
            params = params[name]
        return float(np.std(params))

    for path in (("first", "mixer", "angle"), ("second", "mixer", "mark_u", "map")):
        assert spread(before, "blocks", *path, "weight") == 0
        assert spread(after, "blocks", *path, "weight") > 0.05
    same = ("blocks", "first", "mixer", "shared", "query", "weight")
    assert spread(before, *same) == spread(after, *same) > 0


@pytest.mark.slow  # six models to trace with their gradients
@pytest.mark.parametrize("fine_tune", [False, True])
@pytest.mark.parametrize("name", ["T", "S", "B"])
def test_a_step_has_the_shapes_it_should(name, fine_tune):
    config, settings, size = module().published(name, fine_tune=fine_tune)
    steps = build_image_steps(config, settings, sharding.build_mesh("data=1"), 100)
    batch = Images(
        jax.ShapeDtypeStruct((settings.batch, size, size, 3), np.uint8),
        jax.ShapeDtypeStruct((settings.batch,), np.int32),
    )
    state, loss = steps.train.lower(steps.abstract, batch).out_info
    assert loss.shape == () and loss.dtype == np.float32
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, steps.abstract
    )
    assert all(jax.tree.leaves(same))


def test_the_plan_is_printed():
    done = subprocess.run(
        [sys.executable, str(RUN), "--model", "B", "--plan"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert round(plan["parameters"] / 1e6) == 89 and plan["image"] == 192
    assert plan["steps"] == 400 * (1_281_167 // 2048)


def test_a_folder_that_is_missing_is_one_line(tmp_path):
    command = [sys.executable, str(RUN), "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"There is no folder {tmp_path / 'train'}." in done.stderr
    assert "Traceback" not in done.stderr
