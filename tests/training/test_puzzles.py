"""Training a solver of puzzles: a run that is stopped, devices, halting, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.models.hrm import HRMConfig
from jaxrec.training import sharding
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data.puzzle_batches import GroupBatches, OrderedBatches
from jaxrec.training.data.puzzles import PuzzleSet
from jaxrec.training.metrics import read
from jaxrec.training.puzzles import (
    PuzzleSettings,
    Rows,
    build_puzzle_steps,
    score,
    train_puzzles,
)

MODEL = HRMConfig(
    vocab_size=5,
    length=4,
    width=8,
    heads=2,
    puzzles=8,
    puzzle_width=8,
    high_layers=1,
    low_layers=1,
    max_segments=3,
)
SETTINGS = PuzzleSettings(
    steps=4,
    log_every=1,
    eval_every=2,
    puzzle_rate=1e-2,
    optimizer=OptimizerConfig(
        name="atan2", learning_rate=1e-2, clip_norm=None, warmup_steps=0, ema_decay=0.5
    ),
)


def puzzle_set(count=8):
    """Answers are questions turned round; every puzzle has a vector of its own."""
    tokens = np.random.default_rng(0).integers(1, 5, (count, 4)).astype(np.uint8)
    ends = np.arange(count + 1, dtype=np.int32)
    return PuzzleSet(tokens, tokens[:, ::-1], np.arange(count, dtype=np.int32), ends, ends)


TRAIN = GroupBatches([puzzle_set()], batch=8)
VALID = OrderedBatches(puzzle_set(6), batch=4)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    """Carry, vectors and average included; the number of steps is what differs."""
    whole = train_puzzles(MODEL, TRAIN, VALID, SETTINGS, tmp_path / "whole")

    class Stops(GroupBatches):
        def __call__(self, step, rows=slice(None)):
            if step == 3:
                raise KeyboardInterrupt
            return super().__call__(step, rows)

    with pytest.raises(KeyboardInterrupt):
        train_puzzles(MODEL, Stops([puzzle_set()], batch=8), VALID, SETTINGS, tmp_path / "cut")
    again = train_puzzles(MODEL, TRAIN, VALID, SETTINGS, tmp_path / "cut")
    for left, right in zip(jax.tree.leaves(whole.model), jax.tree.leaves(again.model), strict=True):
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(whole.scores.exact, again.scores.exact)
    lines = [
        [
            {k: v for k, v in line.items() if k != "time"}
            for line in read(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "cut")
    ]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0] if line["kind"] == "valid"] == [2, 4]
    assert np.any(whole.model.puzzle_vectors[...])  # they were trained


def test_devices_agree():
    batch = TRAIN(0)

    def after(mesh):
        mesh = sharding.build_mesh(mesh)
        steps = build_puzzle_steps(MODEL, SETTINGS, 8, mesh)
        state = steps.init()
        for _ in range(2):
            put = Rows(*sharding.put_rows(tuple(batch), mesh))
            state, metrics = steps.train(state, put)
        return jax.device_get((state, metrics))

    (one, metrics), (many, others) = after("data=1"), after("data=4,fsdp=2")
    assert metrics["loss"] == pytest.approx(others["loss"], rel=1e-5)
    np.testing.assert_array_equal(one["carry"].steps, many["carry"].steps)
    for left, right in zip(jax.tree.leaves(one["ema"]), jax.tree.leaves(many["ema"]), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-5)


def test_puzzles_are_scored_after_each_segment_and_where_they_halt(monkeypatch):
    """Rows that fill up the last batch do not count."""
    mesh = sharding.build_mesh("data=1")
    steps = build_puzzle_steps(MODEL, SETTINGS, 8, mesh)
    solved = np.array([[0, 0, 0, 1], [0, 1, 0, 1], [0, 1, 1, 1]], bool)
    halts = np.array([[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
    parts = iter([(solved, halts), (solved[:, ::-1], halts[:, ::-1])])

    def evaluate(state, rows):
        now, stop = next(parts)
        return now.astype(np.float32), now, stop

    scores = score(steps._replace(evaluate=evaluate), VALID, {}, mesh)
    # Four puzzles, and the first two of the same in reverse.
    np.testing.assert_allclose(scores.exact, [2 / 6, 3 / 6, 5 / 6])
    assert scores.halted_exact == pytest.approx(5 / 6)
    assert scores.halted_segments == pytest.approx((3 + 2 + 3 + 1 + 1 + 3) / 6)


def test_bfloat16_keeps_parameters_and_scores_in_float32():
    settings = dataclasses.replace(SETTINGS, precision="bfloat16")
    state = build_puzzle_steps(MODEL, settings, 8, sharding.build_mesh("data=1")).abstract
    assert state["carry"].latent.high.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 5}, "puzzles of 4 tokens up to 4 do not fit a model of 5 tokens"),
        ({"vocab_size": 4}, "of a vocabulary of 4"),
        ({"puzzles": 3}, "vectors for 3"),
    ],
)
def test_data_that_do_not_fit_are_refused(fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train_puzzles(dataclasses.replace(MODEL, **fields), TRAIN, VALID, SETTINGS, tmp_path)


@pytest.mark.parametrize(
    "fields", [{"steps": 0}, {"eval_every": 0}, {"puzzle_rate": 0.0}, {"puzzle_decay": -1.0}]
)
def test_bad_settings_are_refused(fields):
    [name] = fields
    with pytest.raises(UserError, match=f"{name} must be"):
        dataclasses.replace(SETTINGS, **fields)
