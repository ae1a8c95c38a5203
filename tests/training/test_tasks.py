"""Training on made tasks: that what can be learned is, and what is counted."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxrec.models import huginn, linear_rnn
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data.batches import IGNORED
from jaxrec.training.tasks import record, task_accuracy, task_predictions, train_task

CONFIG = dataclasses.replace(
    linear_rnn.TINY, vocab_size=7, width=16, recurrent_width=16, heads=2, mlp_width=24, layers=1
)
OPTIMIZER = OptimizerConfig(learning_rate=3e-2, warmup_steps=5, weight_decay=0.0)


def echo(step):
    """Every second token is to be named at once."""
    inputs = np.random.default_rng(step).integers(0, 7, (16, 8), dtype=np.int32)
    labels = np.where(np.arange(8) % 2 == 0, inputs, np.int32(IGNORED))
    return {"inputs": inputs, "labels": labels}


def test_what_can_be_learned_is_learned():
    results = train_task(CONFIG, echo, steps=40, optimizer=OPTIMIZER)
    assert results.losses.shape == (40,)
    assert results.losses[-1] < 0.5 * results.losses[0]
    test = echo(1000)
    accuracy = task_accuracy(results.model, test)
    assert accuracy > 0.9
    wrong = test | {
        "labels": np.where(test["labels"] == IGNORED, IGNORED, (test["inputs"] + 1) % 7)
    }
    assert task_accuracy(results.model, wrong) <= 1 - accuracy


def test_a_run_is_a_function_of_its_seed():
    one, same, other = (
        train_task(CONFIG, echo, steps=2, optimizer=OPTIMIZER, seed=seed).losses
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)


def test_a_looped_model_learns_at_drawn_depths_and_answers_at_any():
    config = dataclasses.replace(
        huginn.TINY, vocab_size=7, width=16, heads=2, mlp_width=24, core_layers=1, mean_depth=2
    )
    results = train_task(config, echo, steps=40, optimizer=OPTIMIZER)
    assert results.losses[-1] < 0.5 * results.losses[0]
    test = echo(1000)
    assert task_accuracy(results.model, test, depth=6) > 0.9
    fresh = train_task(config, echo, steps=1, optimizer=OPTIMIZER).model  # has not settled
    one = task_predictions(fresh, test, depth=1, key=jax.random.key(0))
    assert one.shape == (16, 8) and one.dtype == np.int32
    assert np.any(one != task_predictions(fresh, test, depth=6, key=jax.random.key(0)))
    default = task_predictions(fresh, test)
    np.testing.assert_array_equal(default, task_predictions(fresh, test, depth=2))


def test_a_run_needs_steps():
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        train_task(CONFIG, echo, steps=0, optimizer=OPTIMIZER)


def test_a_result_replaces_the_one_in_its_place_and_leaves_the_others(tmp_path):
    file = tmp_path / "results.json"
    for name, right in [("b", 0.1), ("a", 0.2), ("b", 0.3)]:
        results = record(file, {"name": name, "right": right}, lambda m: m["name"], batch=2)
    assert results["models"] == [{"name": "a", "right": 0.2}, {"name": "b", "right": 0.3}]
    assert results["batch"] == 2 and "jax" in results["versions"]
    assert json.loads(file.read_text()) == results
