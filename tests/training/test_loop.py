"""A run as a whole: it learns, resumes bit for bit, stops when told to, and refuses to go on with
NaN."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.models import huginn
from jaxrec.training.checkpoint import Checkpoints
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.loop import train
from jaxrec.training.metrics import read
from tests.training.small import HUGINN, MODELS, model_options, run_config, write_text

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

    def crash(model, tokenizer):
        raise RuntimeError("the power failed")

    with pytest.raises(RuntimeError, match="power"):
        train(path, MODELS[path], config, runs=tmp_path, sample=crash)
    again = train(path, MODELS[path], config, runs=tmp_path)
    assert again.step == 8
    assert_same_bits(again.state, outcome.state)
    assert losses(tmp_path / "run") == losses(runs / "run")


def test_a_run_killed_at_a_random_step_resumes_bit_for_bit(text, tmp_path):
    config = run_config(text, steps=60, save_every=7)
    options = [
        "--steps",
        "60",
        "--save-every",
        "7",
        "--name",
        "run",
        "--batch",
        "8",
        "--time",
        "16",
    ]
    options += [
        "--log-every",
        "1",
        "--eval-every",
        "0",
        "--eval-batches",
        "1",
        "--eval-depths",
        "1",
        "2",
    ]
    options += [
        "--data",
        str(text),
        "--data.valid-fraction",
        "0.2",
        "--runs",
        str(tmp_path / "killed"),
    ]
    options += ["--optimizer.learning-rate", "3e-3", "--optimizer.warmup-steps", "0"]
    options += ["--optimizer.schedule", "constant", *model_options(HUGINN, huginn.TINY)]
    command = [sys.executable, "-m", "jaxrec", "train", HUGINN_PATH, *options]
    metrics = tmp_path / "killed" / "run" / "metrics.jsonl"
    victim = random.SystemRandom().randrange(8, 55)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 240
        while not metrics.exists() or len(metrics.read_bytes().splitlines()) < victim:
            assert child.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "the run does not get anywhere"
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
    resumed = train(HUGINN_PATH, HUGINN, config, runs=tmp_path / "killed")
    whole = train(HUGINN_PATH, HUGINN, config, runs=tmp_path / "whole")
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


def test_another_model_or_text_is_refused(straight, text, tmp_path):
    path, runs, _ = straight
    other = dataclasses.replace(MODELS[path], mlp_width=32)
    with pytest.raises(UserError, match=r"another model.*mlp_width 24; this one has 32"):
        train(path, other, run_config(text), runs=runs)
    with pytest.raises(UserError, match="holds a run with seed 0; this one has 1"):
        train(path, MODELS[path], run_config(text, seed=1), runs=runs)
    with pytest.raises(UserError, match="--resume: there is no run"):
        train(path, MODELS[path], run_config(text), runs=tmp_path, resume=True)
