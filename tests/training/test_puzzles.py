"""Training a solver of puzzles: a run that is stopped, devices, halting, and what is refused."""

import dataclasses
import json
import os
import random
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.models.hrm import SUDOKU_4X4, HRMConfig, Rows
from jaxrec.training import puzzles, sharding
from jaxrec.training.checkpoint import Checkpoints
from jaxrec.training.config import OptimizerConfig, PuzzleConfig, PuzzleDataConfig
from jaxrec.training.data.puzzle_folders import write_split
from jaxrec.training.data.puzzle_sources import load_puzzles
from jaxrec.training.data.puzzles import PuzzleSet
from jaxrec.training.metrics import read
from jaxrec.training.pondering import Solution
from jaxrec.training.puzzles import (
    PuzzleSteps,
    build_puzzle_steps,
    evaluate_puzzles_run,
    load_solver,
    score,
    train_puzzles,
)
from jaxrec.training.runs import load_model
from tests.training.commands import kill_after_lines, train_words

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
PATH = "jaxrec.models.hrm:SUDOKU_4X4"


def puzzle_set(count):
    """Answers are questions turned round; every puzzle has a vector of its own."""
    tokens = np.random.default_rng(0).integers(1, 5, (count, 4)).astype(np.uint8)
    ends = np.arange(count + 1, dtype=np.int32)
    return PuzzleSet(tokens, tokens[:, ::-1], np.arange(count, dtype=np.int32), ends, ends)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset in the published format."""
    place = tmp_path_factory.mktemp("puzzles") / "reversed"
    for name, count in (("train", 8), ("test", 6)):
        write_split(place / name, {"all": puzzle_set(count)}, vocabulary=5, identifiers=8)
    return place


@pytest.fixture(scope="module")
def config(folder):
    return PuzzleConfig(
        name="run",
        steps=4,
        batch=8,
        log_every=1,
        eval_every=2,
        save_every=2,
        eval_puzzles=8,
        puzzle_rate=1e-2,
        puzzle_decay=1.0,
        data=PuzzleDataConfig(source=str(folder)),
        optimizer=OptimizerConfig(
            name="atan2", learning_rate=1e-2, clip_norm=None, warmup_steps=0, ema_decay=0.5
        ),
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that was not stopped, and the folder of all runs."""
    runs = tmp_path_factory.mktemp("whole")
    return train_puzzles(PATH, MODEL, config, runs=runs), runs


def lines_of(folder):
    timed = ("time", "puzzles_per_second")
    return [
        {name: value for name, value in line.items() if name not in timed}
        for line in read(folder / "metrics.jsonl")
    ]


def assert_same_bits(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(whole, config, tmp_path, monkeypatch):
    """Carry, vectors and average included."""
    outcome, runs = whole
    right = puzzles._put

    def stops(rows, mesh):
        stops.count += 1
        if stops.count == 5:  # three steps and an evaluation have been
            raise RuntimeError("the power failed")
        return right(rows, mesh)

    stops.count = 0
    with monkeypatch.context() as patch:
        patch.setattr(puzzles, "_put", stops)
        with pytest.raises(RuntimeError, match="power"):
            train_puzzles(PATH, MODEL, config, runs=tmp_path)
    again = train_puzzles(PATH, MODEL, config, runs=tmp_path, resume=True)
    assert_same_bits(again.state, outcome.state)
    assert again.evaluation == outcome.evaluation
    lines = lines_of(runs / "run")
    assert lines_of(tmp_path / "run") == lines
    assert [line["step"] for line in lines if line["kind"] == "valid"] == [2, 4]
    assert np.any(outcome.model.puzzle_vectors[...])  # they were trained
    assert outcome.evaluation.puzzles == 6


def test_a_run_killed_at_a_random_step_resumes_bit_for_bit(tmp_path):
    model = dataclasses.replace(
        SUDOKU_4X4, width=8, heads=2, high_layers=1, low_layers=1, high_cycles=1, max_segments=2
    )
    data = PuzzleDataConfig(puzzles=10, held_out=4, augmentations=1, clues=(9, 9))
    config = PuzzleConfig(
        name="run", steps=60, batch=8, log_every=1, eval_every=0, save_every=7, data=data
    )
    words = train_words(PATH, model, config, tmp_path / "killed")
    # The save of step 7 is complete for certain once that of step 14 has begun.
    victim = random.SystemRandom().randrange(15, 55)
    kill_after_lines(words, tmp_path / "killed" / "run" / "metrics.jsonl", victim)
    resumed = train_puzzles(PATH, model, config, runs=tmp_path / "killed", resume=True)
    straight = train_puzzles(PATH, model, config, runs=tmp_path / "whole")
    assert_same_bits(resumed.state, straight.state)
    assert lines_of(tmp_path / "killed" / "run") == lines_of(tmp_path / "whole" / "run")


def test_a_signal_saves_and_says_so(whole, config, tmp_path, monkeypatch):
    right = puzzles.score

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return right(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(puzzles, "score", interrupted)
        stopped = train_puzzles(PATH, MODEL, config, runs=tmp_path)
    assert (stopped.stopped_by, stopped.evaluation, stopped.step) == ("SIGTERM", None, 3)
    assert_same_bits(train_puzzles(PATH, MODEL, config, runs=tmp_path).state, whole[0].state)


def test_a_trained_solver_is_loaded_and_scored(whole, folder):
    """The running average is what training scores; all puzzles are few enough to be the same."""
    outcome, runs = whole
    scores, step = evaluate_puzzles_run(runs / "run", ema=True)
    assert (scores, step) == (outcome.evaluation, 4)
    parameters, _ = evaluate_puzzles_run(runs / "run", batches=1)
    assert parameters.puzzles == 6
    loaded = load_solver(runs / "run", ema=True)
    assert_same_bits(loaded.model, outcome.model)
    assert loaded.run.config.data.source == str(folder)
    with pytest.raises(UserError, match=r"a solver of puzzles.*--show"):
        load_model(runs / "run")


def test_the_average_is_of_what_the_optimizer_moves(config):
    """After one step: average = decay * before + (1 - decay) * after; vectors are as they are."""
    mesh = sharding.build_mesh("data=1")
    steps = build_puzzle_steps(MODEL, config, mesh)
    start = steps.init()
    before = jax.device_get(start["params"])
    rows = load_puzzles(config.data).batches(8, 0)(0)
    after, _ = steps.train(start, Rows(*sharding.put_rows(tuple(rows), mesh)))

    def kernel(params):
        return np.asarray(params["low"]["mlp"]["gate"]["kernel"])

    want = 0.5 * kernel(before) + 0.5 * kernel(after["params"])
    np.testing.assert_allclose(kernel(after["ema"]), want, rtol=1e-6, atol=1e-9)
    assert np.max(np.abs(kernel(after["ema"]) - kernel(after["params"]))) > 1e-4
    for name in ("puzzle_vectors", "high_start"):
        np.testing.assert_array_equal(after["ema"][name], after["params"][name])


@pytest.mark.parametrize(
    ("fields", "decay"),
    [
        pytest.param({}, None, marks=pytest.mark.slow),  # two more programs to compile
        ({"low_backprop": 2, "max_segments": 2}, 0.9),
    ],
)
def test_both_gradients_learn(fields, decay, config, tmp_path):
    """The one-step gradient, and that through all of the last cycle with a running average."""
    config = dataclasses.replace(
        config,
        steps=120,
        eval_every=0,
        save_every=0,
        log_every=20,
        optimizer=dataclasses.replace(config.optimizer, ema_decay=decay),
    )
    model = dataclasses.replace(MODEL, width=32, **fields)
    outcome = train_puzzles(PATH, model, config, runs=tmp_path)
    lines = [line for line in read(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    assert lines[-1]["answer_loss"] < 0.5 * lines[0]["answer_loss"]
    assert outcome.evaluation.accuracy[-1] > 0.7


def test_devices_agree(config, folder):
    batch = load_puzzles(config.data).batches(8, 0)(0)

    def after(mesh):
        mesh = sharding.build_mesh(mesh)
        steps = build_puzzle_steps(MODEL, config, mesh)
        state = steps.init()
        for _ in range(2):
            state, metrics = steps.train(state, Rows(*sharding.put_rows(tuple(batch), mesh)))
        return jax.device_get((state, metrics))

    (one, metrics), (many, others) = after("data=1"), after("data=4,fsdp=2")
    assert metrics["loss"] == pytest.approx(others["loss"], rel=1e-5)
    np.testing.assert_array_equal(one["carry"].steps, many["carry"].steps)
    for left, right in zip(jax.tree.leaves(one["ema"]), jax.tree.leaves(many["ema"]), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-5)


def test_puzzles_are_scored_after_each_segment_and_where_they_halt(config):
    """Rows that fill up the last batch do not count."""
    mesh, data = sharding.build_mesh("data=1"), load_puzzles(config.data)
    steps = build_puzzle_steps(MODEL, config, mesh)
    solved = np.array([[0, 0, 0, 1], [0, 1, 0, 1], [0, 1, 1, 1]], bool)
    halts = np.array([[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
    parts = iter([(solved, halts), (solved[:, ::-1], halts[:, ::-1])])

    def evaluate(params, rows):
        now, stop = next(parts)
        q = np.stack([stop, np.full_like(stop, 0.5, np.float32)], axis=-1, dtype=np.float32)
        return Solution(np.zeros((3, 4, 4), np.int32), now.astype(np.float32), now, q)

    scores = score(steps._replace(evaluate=evaluate), {}, data, 4, mesh)
    # Four puzzles, and the first two of the same in reverse.
    np.testing.assert_allclose(scores.exact, [2 / 6, 3 / 6, 5 / 6])
    assert scores.halted_exact == pytest.approx(5 / 6)
    assert scores.halted_segments == pytest.approx((3 + 2 + 3 + 1 + 1 + 3) / 6)


def test_variants_of_arc_tasks_vote(tmp_path):
    """A solver that is right about the first of two tasks only, whatever the variant."""
    grids = {"a": [[1, 2], [3, 4]], "b": [[5, 6], [7, 8]]}
    for name, grid in grids.items():
        pair = {"input": grid, "output": grid}
        text = json.dumps({"train": [pair], "test": [pair]})
        (tmp_path / f"{name}.json").write_text(text)
    data = load_puzzles(PuzzleDataConfig(source=str(tmp_path), augmentations=3))
    variants = {i for i, name in enumerate(data.names) if name.startswith("a")}

    def evaluate(params, rows):
        tokens, puzzle = np.asarray(rows.tokens), np.asarray(rows.puzzle)
        known = np.isin(puzzle, list(variants))
        answers = np.where(known[:, None], tokens, np.where(tokens > 1, 2, tokens))[None]
        q = np.zeros((1, len(puzzle), 2), np.float32)
        return Solution(answers, known[None].astype(np.float32), known[None], q)

    steps = PuzzleSteps(None, None, evaluate, None, None, None)
    mesh = sharding.build_mesh("data=1")
    scores = score(steps, {}, data, 3, mesh)
    assert (scores.puzzles, scores.two_attempts, scores.exact) == (8, 0.5, (0.5,))
    assert score(steps, {}, data, 3, mesh, puzzles=8).two_attempts is None


def test_bfloat16_keeps_parameters_and_scores_in_float32(config):
    config = dataclasses.replace(config, precision="bfloat16")
    state = build_puzzle_steps(MODEL, config, sharding.build_mesh("data=1")).abstract
    assert state["carry"].latent.high.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype("float32")}


def test_a_loss_that_is_not_finite_stops_the_run(config, tmp_path):
    wild = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=3e38, weight_decay=10.0),
    )
    with pytest.raises(UserError, match=r"Stopped at step \d.*no checkpoint was written yet"):
        train_puzzles(PATH, MODEL, wild, runs=tmp_path)
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest_step() is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 5}, "puzzles of 4 places and 5 tokens, the model reads 5 places"),
        ({"vocab_size": 4}, "--model.length 4 --model.vocab-size 5"),
        ({"puzzles": 3}, "has 8 vectors of puzzles, the model has room for 3"),
    ],
)
def test_data_that_do_not_fit_are_refused(fields, message, config, tmp_path):
    with pytest.raises(UserError, match=message):
        train_puzzles(PATH, dataclasses.replace(MODEL, **fields), config, runs=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["sudoku-9x9", "maze-30x30"])
def test_puzzles_that_do_not_fit_are_refused_before_they_are_made(source, tmp_path, monkeypatch):
    monkeypatch.setattr(puzzles, "load_puzzles", None)  # calling it would fail
    config = PuzzleConfig(data=PuzzleDataConfig(source=source))
    with pytest.raises(UserError, match=f"{source} has puzzles of .* the model reads 4 places"):
        train_puzzles(PATH, MODEL, config, runs=tmp_path)


def test_another_run_in_the_folder_is_refused(whole, config):
    _, runs = whole
    with pytest.raises(UserError, match=r"a run with puzzle_rate 0\.01; this one has 0\.1"):
        train_puzzles(PATH, MODEL, dataclasses.replace(config, puzzle_rate=0.1), runs=runs)
    with pytest.raises(UserError, match="another model"):
        train_puzzles(PATH, dataclasses.replace(MODEL, high_cycles=3), config, runs=runs)
    with pytest.raises(UserError, match="there is no run"):
        train_puzzles(
            PATH, MODEL, dataclasses.replace(config, name="other"), runs=runs, resume=True
        )


@pytest.mark.parametrize(
    "fields", [{"steps": 0}, {"eval_every": -1}, {"puzzle_rate": 0.0}, {"puzzle_decay": -1.0}]
)
def test_bad_settings_are_refused(fields, config):
    [name] = fields
    with pytest.raises(UserError, match=f"{name} must be"):
        dataclasses.replace(config, **fields)
