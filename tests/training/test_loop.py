"""A run as a whole: it learns, resumes bit for bit, stops when told to, and refuses to go on with
NaN."""

import dataclasses
import io
import json
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.training.checkpoint import Checkpoints
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data.batches import Batches
from jaxrec.training.loop import train
from jaxrec.training.metrics import read
from tests.training.commands import (
    PATIENCE,
    kill_after_lines,
    started,
    train_words,
    wait_for_lines,
)
from tests.training.small import HUGINN, MODELS, run_config, write_text

HUGINN_PATH, LINEAR_RNN_PATH = MODELS


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


@pytest.fixture(scope="module", params=MODELS)
def straight(request, text, tmp_path_factory):
    """An uninterrupted run: model path, its runs folder and its outcome."""
    runs = tmp_path_factory.mktemp("straight")
    return (
        request.param,
        runs,
        train(request.param, MODELS[request.param], run_config(text), runs=runs),
    )


def losses(folder) -> dict[int, float]:
    return {x["step"]: x["loss"] for x in read(folder / "metrics.jsonl") if x["kind"] == "train"}


def assert_same_bits(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def crash(model, tokenizer):
    raise RuntimeError("the power failed")


def test_a_run_leaves_what_its_reader_needs(straight):
    path, runs, outcome = straight
    lines = read(runs / "run" / "metrics.jsonl")
    training = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in training] == list(range(1, 9))
    for name in ("loss", "bits_per_byte", "grad_norm", "learning_rate", "tokens_per_second", "mfu"):
        assert all(np.isfinite(line[name]) for line in training), name
    assert ("depth" in training[0]) == (path == HUGINN_PATH)
    assert outcome.evaluation.bits_per_byte == lines[-1]["bits_per_byte"]
    note = json.loads((runs / "run" / "run.json").read_text())
    assert note["model"] == path
    assert note["data"]["sha256"]
    assert note["versions"]["jax"] == jax.__version__


def test_a_crashed_run_resumes_bit_for_bit(straight, text, tmp_path):
    path, runs, outcome = straight
    config = run_config(text, sample_every=6)
    with pytest.raises(RuntimeError, match="power"):
        train(path, MODELS[path], config, runs=tmp_path, sample=crash)
    again = train(path, MODELS[path], config, runs=tmp_path)
    assert again.step == 8
    assert_same_bits(again.state, outcome.state)
    assert losses(tmp_path / "run") == losses(runs / "run")


def test_a_clock_that_was_set_back_changes_nothing(straight, text, tmp_path, monkeypatch):
    """Neither which checkpoint is the newest nor what is read next."""
    path, runs, outcome = straight
    with pytest.raises(RuntimeError, match="power"):
        train(path, MODELS[path], run_config(text, sample_every=6), runs=tmp_path, sample=crash)
    for file in (tmp_path / "run").rglob("*"):
        os.utime(file, (4e9, 4e9))
    monkeypatch.setattr(time, "time", lambda: 1e9)
    monkeypatch.setattr(time, "time_ns", lambda: 10**18)
    again = train(path, MODELS[path], run_config(text), runs=tmp_path)
    assert again.step == 8
    assert_same_bits(again.state, outcome.state)
    assert losses(tmp_path / "run") == losses(runs / "run")


def test_a_run_killed_at_a_random_step_resumes_bit_for_bit(text, tmp_path):
    config = run_config(text, steps=60, save_every=7)
    words = train_words(HUGINN_PATH, HUGINN, config, tmp_path / "killed")
    victim = random.SystemRandom().randrange(8, 55)
    kill_after_lines(words, tmp_path / "killed" / "run" / "metrics.jsonl", victim)
    resumed = train(HUGINN_PATH, HUGINN, config, runs=tmp_path / "killed")
    whole = train(HUGINN_PATH, HUGINN, config, runs=tmp_path / "whole")
    assert_same_bits(resumed.state, whole.state)
    assert losses(tmp_path / "killed" / "run") == losses(tmp_path / "whole" / "run")


@pytest.mark.slow  # twenty processes
def test_a_run_killed_twenty_times_ends_as_one_that_was_not(text, tmp_path):
    """At random moments: of training, of saving, and of starting again."""
    config = run_config(text, steps=2000, save_every=25)
    model = MODELS[LINEAR_RNN_PATH]
    words = train_words(LINEAR_RNN_PATH, model, config, tmp_path / "killed")
    metrics = tmp_path / "killed" / "run" / "metrics.jsonl"
    for kill in range(20):
        kill_after_lines(words, metrics, 80 * kill + random.SystemRandom().randrange(1, 81))
    resumed = train(LINEAR_RNN_PATH, model, config, runs=tmp_path / "killed")
    whole = train(LINEAR_RNN_PATH, model, config, runs=tmp_path / "whole")
    assert_same_bits(resumed.state, whole.state)
    assert losses(tmp_path / "killed" / "run") == losses(tmp_path / "whole" / "run")


def test_a_run_resumes_on_another_mesh(straight, text, tmp_path):
    """Losses near 5 agree to 1e-6 of themselves, which is ten units in their last place."""
    path, runs, _ = straight
    train(path, MODELS[path], run_config(text, steps=4), runs=tmp_path)
    train(path, MODELS[path], run_config(text, mesh="data=2,fsdp=2,model=2"), runs=tmp_path)
    here, there = losses(tmp_path / "run"), losses(runs / "run")
    np.testing.assert_allclose(
        [here[s] for s in range(1, 9)], [there[s] for s in range(1, 9)], rtol=1e-6
    )


def test_losses_do_not_depend_on_the_mesh(straight, text, tmp_path):
    path, runs, _ = straight
    train(path, MODELS[path], run_config(text, steps=4, mesh="seq=4,data=2"), runs=tmp_path)
    here, there = losses(tmp_path / "run"), losses(runs / "run")
    np.testing.assert_allclose(
        [here[s] for s in range(1, 5)], [there[s] for s in range(1, 5)], rtol=1e-6
    )


def test_accumulation_and_remat_do_not_change_the_losses(text, tmp_path):
    """On the model without a loop, whose loss has no random latent state that microbatches would
    draw anew."""
    model = MODELS[LINEAR_RNN_PATH]
    for name, changes in {"plain": {}, "split": {"accumulate": 4, "remat": "sqrt"}}.items():
        train(LINEAR_RNN_PATH, model, run_config(text, steps=4, **changes), runs=tmp_path / name)
    plain, split = (losses(tmp_path / name / "run") for name in ("plain", "split"))
    np.testing.assert_allclose(list(split.values()), list(plain.values()), rtol=1e-6)


def test_bfloat16_and_the_running_average(text, tmp_path):
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=0, ema_decay=0.5)
    config = run_config(text, precision="bfloat16", remat="block", optimizer=optimizer, steps=4)
    outcome = train(HUGINN_PATH, HUGINN, config, runs=tmp_path)
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(outcome.state["params"])}
    assert kinds == {"float32"}
    assert np.isfinite(list(losses(tmp_path / "run").values())).all()
    ema, params = (jax.tree.leaves(outcome.state[name]) for name in ("ema", "params"))
    assert all(not np.array_equal(a, b) for a, b in zip(ema, params, strict=True) if a.size > 100)


def test_a_signal_saves_and_says_so(straight, text, tmp_path):
    path, _, outcome = straight

    def interrupted(model, tokenizer):
        os.kill(os.getpid(), signal.SIGTERM)
        return "..."

    config = run_config(text, sample_every=3)
    before = signal.getsignal(signal.SIGTERM)
    stopped = train(path, MODELS[path], config, runs=tmp_path, sample=interrupted)
    assert (stopped.stopped_by, stopped.evaluation) == ("SIGTERM", None)
    assert signal.getsignal(signal.SIGTERM) is before
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest_step() == stopped.step < 8
    assert_same_bits(train(path, MODELS[path], config, runs=tmp_path).state, outcome.state)


def test_a_damaged_checkpoint_is_left_out_and_nothing_lost(straight, text, tmp_path):
    path, runs, outcome = straight
    train(path, MODELS[path], run_config(text), runs=tmp_path)
    files = (tmp_path / "run" / "checkpoints" / "8" / "params").rglob("*")
    largest = max((file for file in files if file.is_file()), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    shown = io.StringIO()
    again = train(path, MODELS[path], run_config(text), runs=tmp_path, stream=shown)
    told = [line for line in shown.getvalue().splitlines() if "is damaged" in line]
    assert len(told) == 1
    assert "Going on from step 4; the damaged folder is now" in told[0]
    assert_same_bits(again.state, outcome.state)
    assert losses(tmp_path / "run") == losses(runs / "run")


def test_two_runs_cannot_write_into_one_folder(straight, text, tmp_path):
    path, runs, outcome = straight

    def intrude(model, tokenizer):
        with pytest.raises(UserError, match="run is being written by process"):
            train(path, MODELS[path], run_config(text), runs=tmp_path)
        return "..."

    again = train(
        path, MODELS[path], run_config(text, sample_every=6), runs=tmp_path, sample=intrude
    )
    assert_same_bits(again.state, outcome.state)
    assert losses(tmp_path / "run") == losses(runs / "run")


def test_a_loss_that_is_not_finite_stops_the_run(text, tmp_path):
    optimizer = OptimizerConfig(learning_rate=1e30, warmup_steps=6, schedule="constant")
    good = run_config(text, steps=4, optimizer=OptimizerConfig(warmup_steps=0, schedule="constant"))
    train(HUGINN_PATH, HUGINN, good, runs=tmp_path)
    bad = dataclasses.replace(good, steps=20, name="bad", optimizer=optimizer, save_every=1)
    with pytest.raises(
        UserError, match=r"First not finite: .*(embedding|prelude|core|coda)"
    ) as error:
        train(HUGINN_PATH, HUGINN, bad, runs=tmp_path)
    with np.load(tmp_path / "bad" / "bad_batch.npz") as batch:
        assert batch["inputs"].shape == (8, 16)
        step = int(batch["step"])
    assert f"Stopped at step {step + 1}" in str(error.value)
    with Checkpoints(tmp_path / "bad" / "checkpoints", read_only=True) as checkpoints:
        kept = checkpoints.latest_step()
    assert kept == step
    assert f"checkpoint {kept} is good" in str(error.value)


def test_a_bad_part_of_a_batch_is_found(text, tmp_path):
    """The replay sees the microbatches of the step, and the advice fits the run."""
    optimizer = OptimizerConfig(learning_rate=1e30, clip_norm=None, schedule="constant")
    bad = run_config(text, steps=20, accumulate=2, optimizer=optimizer)
    with pytest.raises(UserError) as error:
        train(LINEAR_RNN_PATH, MODELS[LINEAR_RNN_PATH], bad, runs=tmp_path)
    told = str(error.value)
    assert "in microbatch" in told or "First not finite: parameter" in told
    assert told.endswith("Lower optimizer.learning_rate or set optimizer.clip_norm.")


def test_a_batch_that_does_not_come_ends_the_run(text, tmp_path, monkeypatch):
    """In one line, after the seconds that were asked for; nothing that was saved is lost."""
    hang, make = threading.Event(), Batches.__call__

    def hung(self, step, rows=slice(None)):
        if step == 3 and not hang.wait(60):
            raise RuntimeError("the run did not end by itself")
        return make(self, step, rows)

    config = run_config(text, steps=6, save_every=2, batch_limit=1.0)
    arguments = (LINEAR_RNN_PATH, MODELS[LINEAR_RNN_PATH], config)
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__call__", hung)
        with pytest.raises(UserError, match="batch of step 3 was not there after 1 s"):
            train(*arguments, runs=tmp_path)
        hang.set()
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 2
    assert train(*arguments, runs=tmp_path, resume=True).step == 6
    with pytest.raises(UserError, match="batch_limit must be positive"):
        run_config(text, batch_limit=0.0)


@pytest.mark.slow  # a process of its own
def test_a_folder_that_becomes_read_only_ends_the_run(text, tmp_path):
    """In one line, and the run goes on once it can be written again."""
    config = run_config(text, steps=4000, save_every=20)
    model = MODELS[LINEAR_RNN_PATH]
    words = train_words(LINEAR_RNN_PATH, model, config, tmp_path)
    folder, log = tmp_path / "run" / "checkpoints", tmp_path / "log"
    with started(words, log=log, obeys_modes=True) as child:
        wait_for_lines(tmp_path / "run" / "metrics.jsonl", 50, child)
        folder.chmod(0o555)
        try:
            assert child.wait(PATIENCE) == 2
        finally:
            folder.chmod(0o755)
    told = [line for line in log.read_text().splitlines() if "Could not save" in line]
    assert len(told) == 1 and "(Permission denied); the last good checkpoint is step" in told[0]
    assert "Traceback" not in log.read_text()
    kept = int(told[0].partition("the last good checkpoint is step ")[2].split(".")[0])
    resumed = dataclasses.replace(config, steps=kept + 3)
    assert train(LINEAR_RNN_PATH, model, resumed, runs=tmp_path, resume=True).step == kept + 3


def test_a_run_may_be_trained_outside_the_main_thread(text, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        config = run_config(text, steps=1)
        outcome = pool.submit(
            train, LINEAR_RNN_PATH, MODELS[LINEAR_RNN_PATH], config, runs=tmp_path
        ).result()
    assert outcome.step == 1 and outcome.stopped_by is None


def test_another_model_or_text_is_refused(straight, text, tmp_path):
    path, runs, _ = straight
    other = dataclasses.replace(MODELS[path], mlp_width=32)
    with pytest.raises(UserError, match=r"another model.*mlp_width 24; this one has 32"):
        train(path, other, run_config(text), runs=runs)
    with pytest.raises(UserError, match="holds a run with seed 0; this one has 1"):
        train(path, MODELS[path], run_config(text, seed=1), runs=runs)
    with pytest.raises(UserError, match="--resume: there is no run"):
        train(path, MODELS[path], run_config(text), runs=tmp_path, resume=True)
