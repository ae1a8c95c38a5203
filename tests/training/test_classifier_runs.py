"""A classifier's run: it learns, goes on where it was stopped, is scored, and refuses what does not
fit; and the examples it reads."""

import dataclasses
import os
import signal
import zipfile

import jax
import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.layers.s5 import S5Config
from jaxrec.models.sequence_classifier import SequenceClassifierConfig
from jaxrec.training import classifier_runs, sharding
from jaxrec.training.classification import accuracy
from jaxrec.training.classifier_runs import (
    batch_of,
    build_classifier_steps,
    evaluate_classifier_run,
    score,
    train_classifier_run,
)
from jaxrec.training.config import ClassifierConfig, ExamplesConfig, OptimizerConfig
from jaxrec.training.data.examples import Examples, digits, load_examples, permuted, resampled
from jaxrec.training.metrics import read
from jaxrec.training.runs import load_model, read_run

PATH = "jaxrec.models.sequence_classifier:DIGITS"
MODEL = SequenceClassifierConfig(
    inputs=1,
    classes=2,
    mixer=S5Config(width=8, state=4, bidirectional=True, dt_min=0.01),
    layers=2,
    dropout=0.1,
)


def arrays(count):
    """Ramps that rise or fall, of unequal length; what comes after the end is garbage."""
    rng = np.random.default_rng(count)
    labels = rng.integers(0, 2, count)
    slope = np.where(labels, 1.0, -1.0)[:, None] * np.linspace(-1, 1, 12)
    inputs = slope + 0.3 * rng.normal(size=slope.shape)
    lengths = rng.integers(8, 13, count)
    inputs[np.arange(12)[None] >= lengths[:, None]] = np.nan
    return {"inputs": inputs[..., None], "labels": labels, "lengths": lengths}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "ramps.npz"
    held_out = {f"valid_{name}": array for name, array in arrays(13).items()}
    np.savez(path, **arrays(40), **held_out)
    return path


@pytest.fixture(scope="module")
def config(file):
    return ClassifierConfig(
        name="run",
        steps=12,
        batch=8,
        log_every=1,
        eval_every=6,
        save_every=3,
        data=ExamplesConfig(source=str(file)),
        optimizer=OptimizerConfig(
            learning_rate=2e-2, warmup_steps=0, schedule="constant", ema_decay=0.5
        ),
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that was not stopped, and the folder of all runs."""
    runs = tmp_path_factory.mktemp("whole")
    return train_classifier_run(PATH, MODEL, config, runs=runs), runs


def lines_of(folder):
    timed = ("time", "examples_per_second")
    return [
        {name: value for name, value in line.items() if name not in timed}
        for line in read(folder / "metrics.jsonl")
    ]


def assert_same_bits(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_run_that_is_told_to_stop_goes_on_as_if_it_had_not_been(
    whole, config, tmp_path, monkeypatch
):
    """In the second epoch; order, dropout, moments and average included."""
    outcome, runs = whole
    right = classifier_runs.score

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return right(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(classifier_runs, "score", interrupted)
        stopped = train_classifier_run(PATH, MODEL, config, runs=tmp_path)
    assert (stopped.stopped_by, stopped.evaluation, stopped.step) == ("SIGTERM", None, 7)
    again = train_classifier_run(PATH, MODEL, config, runs=tmp_path, resume=True)
    assert_same_bits(again.state, outcome.state)
    assert again.evaluation == outcome.evaluation
    lines = lines_of(runs / "run")
    assert lines_of(tmp_path / "run") == lines
    assert [line["step"] for line in lines if line["kind"] == "valid"] == [6, 12]
    stable = [line for line in lines if line["kind"] == "model"]
    assert [line["step"] for line in stable] == [6, 12]
    assert all(0.9 < line["largest_decay"] < 1 and line["unstable"] == 0 for line in stable)
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 12 and np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_a_trained_classifier_is_scored(whole):
    """13 are held out, so that the last of two batches is filled up."""
    outcome, runs = whole
    scores, step = evaluate_classifier_run(runs / "run", ema=True)
    assert (scores, step) == (outcome.evaluation, 12)
    assert scores.examples == 13
    assert scores.accuracy == pytest.approx(accuracy(outcome.model, outcome.data.valid))
    some, _ = evaluate_classifier_run(runs / "run", batches=1, step=9)
    assert some.examples == 8 and some != scores
    with pytest.raises(UserError, match=r"run of a classifier, which reads no text; `jaxrec eval"):
        load_model(runs / "run")


def test_a_run_at_another_rate_is_scored_on_a_file(config, tmp_path):
    """Which is read at one sample per pixel, and its time steps scaled to that."""
    at = ExamplesConfig(rate=0.5, valid_fraction=0.02)
    here = dataclasses.replace(config, steps=1, eval_every=0, data=at)
    model = dataclasses.replace(MODEL, classes=10)
    train_classifier_run(PATH, model, here, runs=tmp_path)
    train, valid, _ = load_examples(dataclasses.replace(at, rate=1.0))
    file = tmp_path / "pixels.npz"
    np.savez(
        file,
        inputs=train.inputs[:8],
        labels=train.labels[:8],
        valid_inputs=valid.inputs,
        valid_labels=valid.labels,
    )
    folder = tmp_path / "run"
    assert evaluate_classifier_run(folder, source=str(file)) == evaluate_classifier_run(
        folder, rate=1.0
    )
    permuted_at_half, _ = evaluate_classifier_run(folder, source="digits-permuted")
    assert permuted_at_half.examples == len(valid.labels)
    with pytest.raises(UserError, match=r"Leave it at 1 for .*pixels\.npz"):
        evaluate_classifier_run(folder, source=str(file), rate=0.5)


def test_the_order_is_a_function_of_seed_and_step(config, file):
    train = load_examples(config.data).train
    epochs = [
        np.concatenate([batch_of(train, config, step, slice(None)).labels for step in steps])
        for steps in (range(5), range(5, 10))
    ]
    assert np.any(epochs[0] != epochs[1])
    for labels in epochs:
        np.testing.assert_array_equal(np.sort(labels), np.sort(train.labels))
    half = batch_of(train, config, 7, slice(2, 5))
    np.testing.assert_array_equal(half.inputs, batch_of(train, config, 7, slice(None)).inputs[2:5])
    other = batch_of(train, dataclasses.replace(config, seed=1), 0, slice(None))
    assert np.any(other.lengths != batch_of(train, config, 0, slice(None)).lengths)


def test_devices_agree(config):
    """Rows over two, time over four, and what is stored recomputed."""
    train = load_examples(config.data).train
    model = dataclasses.replace(MODEL, dropout=0.0)

    def after(mesh, remat):
        here = dataclasses.replace(config, mesh=mesh, remat=remat)
        mesh = sharding.build_mesh(mesh)
        steps = build_classifier_steps(model, here, mesh)
        state = steps.init()
        for step in range(2):
            batch = sharding.put_rows(batch_of(train, here, step, slice(None)), mesh)
            state, metrics = steps.train(state, batch)
        return jax.device_get((state, metrics))

    (one, metrics), (many, others) = after("data=1", "none"), after("data=2,seq=4", "block")
    assert metrics["loss"] == pytest.approx(others["loss"], rel=1e-5)
    for left, right in zip(jax.tree.leaves(one["ema"]), jax.tree.leaves(many["ema"]), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-5)


def test_rows_that_fill_up_a_batch_do_not_count():
    examples = Examples(np.zeros((5, 3, 1), np.float32), np.array([0, 1, 1, 0, 1], np.int32))
    seen = []

    def evaluate(params, batch, weights, step_rescale):
        seen.append(float(step_rescale))
        right = np.asarray(batch.labels) == 1
        return np.sum(np.asarray(weights) * 2.0), np.sum(np.asarray(weights) * right)

    steps = classifier_runs.ClassifierSteps(None, None, evaluate, *[None] * 4)
    scores = score(steps, {}, examples, 2, sharding.build_mesh("data=1"), step_rescale=0.5)
    assert dataclasses.astuple(scores) == (pytest.approx(3 / 5), pytest.approx(2.0), 5)
    assert seen == [0.5] * 3


def test_a_loss_that_is_not_finite_stops_the_run(config, tmp_path):
    wild = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, learning_rate=3e38)
    )
    with pytest.raises(UserError, match=r"Stopped at step \d.*no checkpoint was written yet"):
        train_classifier_run(PATH, MODEL, wild, runs=tmp_path)


def test_what_does_not_fit_is_refused(whole, config, tmp_path):
    for fields, message in (
        ({"inputs": 3}, r"inputs must be \(b t 3\) .* another --model\.inputs"),
        ({"classes": 1}, r"labels must lie in \[0, 1\), got 0 to 1"),
    ):
        with pytest.raises(UserError, match=message):
            train_classifier_run(PATH, dataclasses.replace(MODEL, **fields), config, runs=tmp_path)
    with pytest.raises(UserError, match="A batch of 41 needs as many examples of training, got 40"):
        train_classifier_run(PATH, MODEL, dataclasses.replace(config, batch=41), runs=tmp_path)
    watched = dataclasses.replace(config, monitors="newton")
    with pytest.raises(UserError, match=r"nothing to say of newton\. It can give state, gates"):
        train_classifier_run(PATH, MODEL, watched, runs=tmp_path)
    assert not list(tmp_path.iterdir())
    other = dataclasses.replace(config, state_space_rate=0.1)
    with pytest.raises(UserError, match=r"a run with state_space_rate 0\.002; this one has 0\.1"):
        train_classifier_run(PATH, MODEL, other, runs=whole[1])
    with pytest.raises(UserError, match=r"of a classifier must be adamw; got lamb"):
        ClassifierConfig(optimizer=OptimizerConfig(name="lamb"))


def test_digits_are_rows_of_pixels():
    data = load_examples(ExamplesConfig(valid_fraction=0.1))
    pixels, labels = digits()
    assert data.train.inputs.shape == (1617, 64, 1) and data.valid.inputs.shape == (180, 64, 1)
    np.testing.assert_array_equal(data.valid.inputs[..., 0], pixels[:180])
    np.testing.assert_array_equal(data.train.labels, labels[180:])
    mixed = load_examples(ExamplesConfig(source="digits-permuted", rate=2.0))
    np.testing.assert_array_equal(mixed.valid.inputs[:, ::2, 0], permuted(pixels)[:359])
    assert np.any(permuted(pixels) != pixels)
    assert mixed.provenance["sha256"] != data.provenance["sha256"]
    ramp = np.arange(4, dtype=np.float32)[None]
    np.testing.assert_allclose(resampled(ramp, 2.0), [[0, 0.5, 1, 1.5, 2, 2.5, 3, 3]])
    np.testing.assert_allclose(resampled(ramp, 0.5), [[0, 2]])


def test_a_file_without_held_out_examples_is_split(tmp_path):
    file = tmp_path / "bytes.npz"
    inputs = np.arange(10, dtype=np.uint8).reshape(10, 1, 1)
    np.savez(file, inputs=inputs, labels=np.arange(10))
    train, valid, about = load_examples(ExamplesConfig(source=str(file), valid_fraction=0.3))
    assert train.inputs.dtype == np.uint8 and train.lengths is None
    assert (about["examples"], about["held_out"]) == (7, 3)
    for side in (train, valid):
        np.testing.assert_array_equal(side.inputs[:, 0, 0], side.labels)
    assert sorted([*train.labels, *valid.labels]) == list(range(10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "lacks the array labels"),
        ({"inputs": np.zeros((40, 12))}, r"inputs must be float or uint8, .* float64 \(40, 12\)"),
        ({"inputs": np.zeros((40, 12, 1), object)}, "Cannot read .*: Object arrays cannot"),
        (
            {"labels": np.zeros(40)},
            r"labels must be integers, .* of 40 inputs, got float64",
        ),
        ({"lengths": np.ones(3, int)}, r"lengths must be integers, .* got int64 \(3,\)"),
        ({"length": np.ones(3)}, "has an array 'length'. Did you mean lengths?"),
        ({"valid_inputs": np.zeros((2, 12, 1))}, "lacks the array valid_labels"),
    ],
)
def test_files_that_cannot_be_used(change, message, tmp_path):
    file = tmp_path / "file.npz"
    content = arrays(40) | change
    np.savez(file, **{name: array for name, array in content.items() if array is not None})
    with pytest.raises(UserError, match=message):
        load_examples(ExamplesConfig(source=str(file)))


def test_damaged_archives_are_refused(tmp_path):
    """Every byte of one flipped in turn: of the compressed data, checksums, names and flags, one of
    which says that a member is encrypted.
    """
    whole, file = tmp_path / "whole.npz", tmp_path / "file.npz"
    np.savez_compressed(whole, inputs=np.arange(24.0).reshape(6, 4, 1), labels=np.arange(6))
    good = whole.read_bytes()
    refused = []
    for place in range(len(good)):
        for bit in (1, 32):
            file.write_bytes(good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :])
            try:
                load_examples(ExamplesConfig(source=str(file), valid_fraction=0.4))
            except UserError as error:
                refused.append(str(error))
    for part in ("decompressing data", "compression method", "encrypted", "CRC", "lacks the array"):
        assert any(part in message for message in refused), part


def test_a_member_that_is_no_array_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("inputs", "1 2 3")
    with pytest.raises(UserError, match="inputs is no array of NumPy"):
        load_examples(ExamplesConfig(source=str(tmp_path / "text.npz")))


def test_sources_that_there_are_not(tmp_path):
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 and no more")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for options, message in (
        ({"source": "digit"}, "no examples 'digit'. Did you mean digits?"),
        ({"source": str(tmp_path / "torn.npz")}, "Cannot read"),
        ({"source": str(tmp_path / "one.npy")}, f"^{tmp_path / 'one.npy'} is one array"),
        (
            {"source": str(tmp_path / "torn.npz"), "rate": 2.0},
            r"rate is 2, but only digits and digits-permuted can .* Leave it at 1 for .*torn\.npz",
        ),
    ):
        with pytest.raises(UserError, match=message):
            load_examples(ExamplesConfig(**options))
    for options, message in (
        ({"source": ""}, "data.source is empty"),
        ({"rate": 0.0}, "data.rate must be positive"),
        ({"valid_fraction": 0.7}, "valid_fraction must lie in"),
    ):
        with pytest.raises(UserError, match=message):
            ExamplesConfig(**options)


def test_the_mixer_in_run_json_is_the_one_that_was_trained(whole):
    run = read_run(whole[1] / "run")
    assert run.model_config == MODEL and isinstance(run.config, ClassifierConfig)
