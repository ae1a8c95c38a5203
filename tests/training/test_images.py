"""Training on images from disk: mixing, the order, a run that is stopped, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.models.vit import ViTConfig
from jaxrec.training import images
from jaxrec.training.checkpoint import Checkpoints
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data.images import ImageFolder
from jaxrec.training.images import ImageSettings, batch_of, mixed, train_images
from jaxrec.training.lock import locked
from jaxrec.training.metrics import read
from tests.training.test_data_images import write

MODEL = ViTConfig(classes=2, width=8, heads=2, layers=1, mlp_width=8, patch=4, grid=(2, 2))
SETTINGS = ImageSettings(
    epochs=2,
    batch=4,
    warmup_epochs=0,
    repeats=2,
    save_epochs=1,
    log_every=1,
    precision="float32",
    optimizer=OptimizerConfig(name="lamb", learning_rate=1e-3),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return ImageFolder(write(tmp_path_factory.mktemp("images"), count=5), 8, workers=2)


@pytest.mark.parametrize("kind", ["mixup", "cutmix", "both", "neither"])
def test_labels_are_mixed_as_the_pixels_are(kind):
    """Image i has the value i everywhere, so that a mean says how much of each there is."""
    off = {"mixup": {"cutmix": 0.0}, "cutmix": {"mixup": 0.0}, "both": {}}
    settings = dataclasses.replace(SETTINGS, **off.get(kind, {"mixup": 0.0, "cutmix": 0.0}))
    batch = jnp.broadcast_to(jnp.arange(4.0)[:, None, None, None], (4, 9, 6, 3))
    mix = jax.jit(lambda key: mixed(batch, jnp.eye(4), settings, key))
    weights, flat = [], []
    for seed in range(20):
        x, labels = (np.asarray(part) for part in mix(jax.random.key(seed)))
        np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(x.mean((1, 2, 3)), labels @ np.arange(4), atol=1e-5)
        weights.append(labels[0, 0])
        flat.append(np.ptp(x[0]) < 1e-6)
    if kind == "neither":
        assert weights == [1.0] * 20
        return
    assert 0.2 < np.mean(weights) < 0.8 and len(set(np.round(weights, 3))) > 5
    assert {"mixup": all(flat), "cutmix": not all(flat), "both": 0 < sum(flat) < 20}[kind]


def test_an_epoch_reads_a_part_of_the_images_several_times(data):
    one = [batch_of(data, SETTINGS, step, slice(None)) for step in (0, 1, 2)]
    again = batch_of(data, SETTINGS, 1, slice(2, 4))
    np.testing.assert_array_equal(again.images, one[1].images[2:])
    np.testing.assert_array_equal(one[0].labels[::2], one[0].labels[1::2])
    assert np.any(one[0].images[0] != one[0].images[1])
    assert np.any(one[0].images != one[2].images)  # the next epoch


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(data, tmp_path):
    whole = train_images(MODEL, data, data, SETTINGS, tmp_path / "whole")
    assert whole.steps == 4 and 0 <= whole.accuracy <= 1
    real, made = images.batch_of, []

    def fails(data, settings, step, rows):
        if step == 3 and not made:
            made.append(step)
            raise KeyboardInterrupt
        return real(data, settings, step, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "batch_of", fails)
        with pytest.raises(KeyboardInterrupt):
            train_images(MODEL, data, data, SETTINGS, tmp_path / "cut")
        rest = train_images(MODEL, data, data, SETTINGS, tmp_path / "cut")
    for a, b in zip(jax.tree.leaves(whole.model), jax.tree.leaves(rest.model), strict=True):
        np.testing.assert_array_equal(a, b)
    lines = [
        [(line["kind"], line["step"], line.get("loss")) for line in read(folder / "metrics.jsonl")]
        for folder in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 6
    finished = train_images(MODEL, data, data, SETTINGS, tmp_path / "whole")
    assert finished.accuracy == whole.accuracy
    for change in ({"epochs": 1}, {"seed": 7}):
        other = dataclasses.replace(SETTINGS, **change)
        (name, value), *_ = change.items()
        with pytest.raises(UserError, match=f"holds a run with {name} .*; this one has {value}"):
            train_images(MODEL, data, data, other, tmp_path / "whole")


def test_what_is_not_finite_is_not_saved(data, tmp_path):
    wild = OptimizerConfig(learning_rate=1e38, clip_norm=None, schedule="constant")
    settings = dataclasses.replace(SETTINGS, log_every=100, optimizer=wild)
    with pytest.raises(UserError, match=r"Lower the learning rate; the last good state is .* 0"):
        train_images(MODEL, data, data, settings, tmp_path)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as saved:
        assert saved.latest_step() is None


def test_two_runs_cannot_write_into_one_folder(data, tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="is being written by process"):
        train_images(MODEL, data, data, SETTINGS, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock"]


def test_eight_devices_agree_with_one(data, tmp_path):
    settings = dataclasses.replace(SETTINGS, epochs=1, batch=8, loss="one", smoothing=0.1)
    one = train_images(MODEL, data, data, settings, tmp_path / "one")
    spread = dataclasses.replace(settings, mesh="data=4,fsdp=2")
    eight = train_images(MODEL, data, data, spread, tmp_path / "eight")
    for a, b in zip(jax.tree.leaves(one.model), jax.tree.leaves(eight.model), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_does_not_fit_is_refused(data, tmp_path):
    for change, message in (
        ({"classes": 3}, "The model has 3 classes, the folder of training 2"),
        ({"patch": 3}, "do not fit a model with patches of 3"),
        ({"inputs": 1}, "do not fit a model with patches of 4 and 1 colours"),
    ):
        with pytest.raises(UserError, match=message):
            train_images(dataclasses.replace(MODEL, **change), data, data, SETTINGS, tmp_path)
    large = dataclasses.replace(SETTINGS, batch=16)
    with pytest.raises(UserError, match="A batch of 16 needs as many images"):
        train_images(MODEL, data, data, large, tmp_path)
    for change, message in (
        ({"repeats": 0}, "repeats must be >= 1; got 0"),
        ({"mixup": -1.0}, "mixup must be >= 0; got -1.0"),
        ({"smoothing": 1.0}, r"smoothing must lie in \[0, 1\)"),
        ({"loss": "both"}, "loss must be one of each, one; got 'both'"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(SETTINGS, **change)
