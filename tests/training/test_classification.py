"""Training a classifier: it learns, repeats itself, keeps two groups apart, refuses bad data."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.s5 import S5Config
from jaxrec.models.sequence_classifier import SequenceClassifierConfig
from jaxrec.training.classification import (
    ClassificationData,
    ClassificationSettings,
    Examples,
    accuracy,
    optimizer_for,
    train_classifier,
)
from jaxrec.training.config import OptimizerConfig

CONFIG = SequenceClassifierConfig(
    inputs=1,
    classes=2,
    mixer=S5Config(width=8, state=4, bidirectional=True, dt_min=0.01),
    layers=1,
    dropout=0.1,
)
SETTINGS = ClassificationSettings(
    epochs=9, batch=16, optimizer=OptimizerConfig(learning_rate=2e-2, warmup_steps=4)
)


def rising_or_falling(count, seed):
    """Ramps with noise, of unequal length; what comes after the end is garbage."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count).astype(np.int32)
    slope = np.where(labels, 1.0, -1.0)[:, None] * np.linspace(-1, 1, 12)
    inputs = (slope + 0.3 * rng.normal(size=slope.shape)).astype(np.float32)
    lengths = rng.integers(8, 13, count).astype(np.int32)
    inputs[np.arange(12)[None] >= lengths[:, None]] = np.nan
    return Examples(inputs[..., None], labels, lengths)


DATA = ClassificationData(rising_or_falling(96, 0), rising_or_falling(40, 1))


def test_it_learns_and_a_second_run_is_the_same():
    first, second = (train_classifier(CONFIG, DATA, SETTINGS) for _ in range(2))
    assert first.losses.shape == (54,) and np.all(np.isfinite(first.losses))
    assert np.mean(first.losses[-6:]) < 0.5 * first.losses[0]
    assert first.accuracy >= 0.95
    np.testing.assert_array_equal(first.losses, second.losses)
    assert first.accuracy == accuracy(first.model, DATA.valid, batch=7)


def test_bytes_are_read_as_numbers_from_0_to_1():
    data = jax.tree.map(lambda leaf: leaf, DATA)
    levels = [np.nan_to_num(np.clip(part.inputs, 0, 1) * 255).astype(np.uint8) for part in data]
    as_bytes, as_floats = (
        ClassificationData(*(part._replace(inputs=x) for part, x in zip(data, inputs, strict=True)))
        for inputs in (levels, [x.astype(np.float32) / 255 for x in levels])
    )
    short = dataclasses.replace(SETTINGS, epochs=1)
    want, got = (train_classifier(CONFIG, data, short) for data in (as_floats, as_bytes))
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-5)
    assert got.accuracy == want.accuracy


def test_state_space_parameters_have_their_rate_and_no_decay():
    """With a gradient of zero only the decay moves; with one of 1, Adam moves each by its rate."""
    model = jax.jit(lambda key: CONFIG.build(rngs=nnx.Rngs(key)))(jax.random.key(0))
    params = nnx.to_pure_dict(nnx.split(model)[1])
    settings = dataclasses.replace(
        SETTINGS,
        state_space_rate=1e-4,
        optimizer=OptimizerConfig(
            learning_rate=1e-2, weight_decay=0.5, warmup_steps=0, clip_norm=None
        ),
    )
    optimizer = optimizer_for(params, settings, 10)

    def moved(gradient):
        grads = jax.tree.map(lambda leaf: np.full(leaf.shape, gradient, np.float32), params)
        update = jax.jit(
            lambda *trees: optimizer.update(trees[0], optimizer.init(params), trees[1])
        )
        updates, _ = update(grads, params)
        flat = jax.tree_util.tree_leaves_with_path(updates)
        return {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in flat}

    decayed, stepped = moved(0.0), moved(1.0)
    own = {name for name, update in stepped.items() if np.max(np.abs(update)) < 1.1e-4}
    assert own == {
        *(f"blocks/mixer/{n}_{p}" for n in ("eigenvalue", "input") for p in ("real", "imag")),
        "blocks/mixer/log_step",
        "blocks/norm/bias",
        "blocks/norm/scale",
    }
    still = {name for name, update in decayed.items() if not np.any(update)}
    assert still == own | {name for name in decayed if name.endswith("bias")}


def test_bad_data_and_settings_are_refused():
    train = DATA.train
    for change, message in (
        ({"inputs": train.inputs[..., 0]}, r"data\.train: inputs must be \(b t 1\)"),
        ({"labels": train.labels + 1}, r"labels must lie in \[0, 2\), got 1 to 2"),
        ({"lengths": train.lengths + 1}, r"lengths must lie in \[1, 12\], got 9 to 13"),
    ):
        with pytest.raises(ValueError, match=message):
            train_classifier(CONFIG, DATA._replace(train=train._replace(**change)), SETTINGS)
    with pytest.raises(ValueError, match=r"a batch of 100 needs as many examples, got 96"):
        train_classifier(CONFIG, DATA, dataclasses.replace(SETTINGS, batch=100))
    with pytest.raises(ValueError, match=r"epochs and batch must be >= 1, got 0 and 64"):
        ClassificationSettings(epochs=0)
    with pytest.raises(ValueError, match=r"state_space_rate must be > 0, got 0"):
        ClassificationSettings(state_space_rate=0.0)
    with pytest.raises(ValueError, match=r"the optimizer must be adamw, got adam_atan2"):
        ClassificationSettings(optimizer=OptimizerConfig(name="adam_atan2"))
