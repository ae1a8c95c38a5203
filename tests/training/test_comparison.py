"""Models trained for equal time: a clock of one second per look says when each ends."""

import dataclasses
import io
import itertools

import jax
import numpy as np
import optax
import pytest

from jaxrec.errors import UserError
from jaxrec.training import comparison, sharding
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.step import build_steps
from tests.training.small import LINEAR_RNN, run_config, write_text


def ticking(seconds):
    """So many seconds pass from one look to the next."""
    return itertools.count(0, seconds).__next__


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("data") / "text")
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=100, final_fraction=0.0)
    return run_config(text, steps=1000, batch=2, log_every=2, optimizer=optimizer)


def compared(config, minutes, clock, stream=None):
    return comparison.equal_time({"A": LINEAR_RNN}, config, minutes, clock=clock, stream=stream)


def test_a_run_ends_when_its_time_is_over(config):
    """Whose first step is not counted: at 0.7 seconds a step nine more are begun within 6."""
    results, curves = compared(config, 0.1, ticking(0.7))
    row = results["models"]["A"]
    assert (row["steps"], row["tokens"], row["training_seconds"]) == (10, 320, 6.3)
    assert row["parameters"] > 1000 and 0 < row["bits_per_byte"] < 10
    assert results["data"]["source"] == config.data.source
    assert curves["A"]["tokens"] == [64, 128, 192, 256, 320]
    np.testing.assert_allclose(curves["A"]["seconds"], [0.7, 2.1, 3.5, 4.9, 6.3])
    assert len(curves["A"]["bits_per_byte"]) == 5
    again, curve = compared(config, 0.1, ticking(0.7))
    assert (again["models"]["A"]["bits_per_byte"], curve) == (row["bits_per_byte"], curves)
    faster, _ = compared(config, 0.1, ticking(0.5))
    assert faster["models"]["A"]["steps"] == 13


def test_the_schedule_follows_the_share_of_time(config):
    """An update of Adam is as large as the rate: that of the part, whatever the step."""
    steps = build_steps(LINEAR_RNN, config, sharding.build_mesh("data=1"))
    state = comparison._at(steps.init(), 750)
    places = [
        leaf.count
        for leaf in jax.tree.leaves(
            state["opt_state"], is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState)
        )
        if isinstance(leaf, optax.ScaleByScheduleState)
    ]
    assert [int(place) for place in places] == [750]


def test_an_optimizer_that_counts_its_schedule_in_steps_is_refused(config):
    other = dataclasses.replace(config.optimizer, name="adam_atan2")
    with pytest.raises(UserError, match=r"cannot follow time, as is so of adam_atan2\. Choose"):
        compared(dataclasses.replace(config, optimizer=other), 0, ticking(1.0))


def test_processor_time_is_that_of_training(config, monkeypatch):
    """From the end of the first step, which compiles, to the evaluation, which takes 7 s here."""
    now = [1000.0]

    def evaluate(*arguments, **options):
        now[0] += 7
        return right(*arguments, **options)

    def clock():  # looked at after every step
        now[0] += 2.5
        return now[0]

    right = comparison.evaluate
    monkeypatch.setattr(comparison, "evaluate", evaluate)
    monkeypatch.setattr(comparison.time, "process_time", lambda: now[0])
    row = compared(config, 0.1, clock)[0]["models"]["A"]
    assert (row["steps"], row["processor_seconds"]) == (4, 7.5)


@pytest.mark.parametrize("last", [1, 2])
def test_a_step_that_is_not_finite_ends_it(last, config, monkeypatch):
    """Be it the first one."""
    right = comparison.build_steps

    def build(*arguments):
        steps = right(*arguments)
        count = itertools.count(1)

        def train(*arguments):
            state, metrics = steps.train(*arguments)
            return state, metrics | {"healthy": np.bool_(next(count) != last)}

        return steps._replace(train=train)

    monkeypatch.setattr(comparison, "build_steps", build)
    with pytest.raises(UserError, match=rf"A stopped at step {last}: loss .* not all finite"):
        compared(config, 0.1, ticking(0.7))


def test_progress_is_told_in_seconds_and_true_steps(config):
    stream = io.StringIO()
    compared(config, 0.1, ticking(0.7), stream)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5 and "bits/byte" in lines[-1] and "tokens/s" in lines[-1]
    assert [line.partition("  step ")[0] for line in lines] == [
        f"A  {spent} of 6 s" for spent in (1, 2, 4, 5, 6)
    ]
    assert [int(line.split("step ")[1].split()[0]) for line in lines] == [2, 4, 6, 8, 10]


def test_no_time_is_two_steps(config):
    results, curves = compared(config, 0, ticking(1.0))
    assert results["models"]["A"]["steps"] == 2 and len(curves["A"]["tokens"]) == 1


def test_the_curves_are_drawn(tmp_path):
    curve = {"tokens": [10, 20], "seconds": [1.0, 2.0], "bits_per_byte": [4.0, 3.0]}
    comparison.plot_equal_time({"A": curve, "B": curve}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
