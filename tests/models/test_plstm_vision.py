"""pLSTM's classifier of images: published sizes, any resolution, pooling, dropping, training."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.config import from_dict, to_dict
from jaxrec.layers.axes import mesh_axes
from jaxrec.models import plstm_vision
from jaxrec.models.plstm_vision import PLSTMVisionConfig, vision_config
from jaxrec.training.classification import (
    ClassificationData,
    ClassificationSettings,
    Examples,
    train_classifier,
)
from jaxrec.training.config import OptimizerConfig
from tests.models import toy

SMALLEST = vision_config(width=16, heads=2, layers=1, patch=2, grid=(3, 4), classes=5)
SIZES = {"VISION_T": (6.2, 6), "VISION_S": (23.0, 23), "VISION_B": (88.6, 89)}


def images(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(2, *shape, 3)).astype(np.float32)


@jax.jit
def run(model, x, key=None):
    return model(x, key=key)


def numbers(width, heads, layers, patch, grid, classes):
    """What the published configuration holds, counted by hand."""
    gates = 4 * heads
    each = width // gates + 1  # a gate reads its part of the channels, and has a bias
    shared = 3 * (width * width + width) + heads + width + width * width
    p = 3 * gates * each + gates * (width + 1)
    d = 7 * gates * each
    inner = -(-4 * width // 64) * 64
    mlp = 2 * width * inner + inner + width + 2 * width
    blocks = layers * (p + d + 2 * (shared + mlp))
    head = 4 * width * classes + classes
    return patch**2 * 3 * width + width + grid[0] * grid[1] * width + blocks + width + head


@pytest.mark.parametrize("name", SIZES)
def test_published_numbers_of_parameters(name):
    """The paper: 6, 23 and 89 million."""
    config = getattr(plstm_vision, name)
    count = toy.parameters(config)
    heads = config.first.mixer.heads
    assert count == numbers(config.width, heads, 6, 16, (12, 12), 1000)
    assert round(count / 1e6) == SIZES[name][1]


def test_the_configuration_round_trips_and_parameters_name_their_axes():
    data = json.loads(json.dumps(to_dict(SMALLEST)))
    assert from_dict(PLSTMVisionConfig, data) == SMALLEST
    model = nnx.eval_shape(lambda: SMALLEST.build(rngs=nnx.Rngs(0)))
    for path, leaf in nnx.to_flat_state(nnx.split(model)[1]):
        axes = leaf.get_metadata("axes")
        assert len(leaf.shape) == len(axes) + (path[0] == "blocks"), path
        mesh_axes(axes)


def test_other_resolutions_resize_positions():
    """A model without positions does not depend on the grid of training, one with them does."""
    model = toy.drawn(SMALLEST)
    assert run(model, images(6, 8)).shape == run(model, images(10, 4)).shape == (2, 5)
    wide = dataclasses.replace(SMALLEST, grid=(6, 8))
    resized = toy.drawn(SMALLEST)
    graph, state = nnx.split(nnx.eval_shape(lambda: wide.build(rngs=nnx.Rngs(0))))
    params = nnx.to_pure_dict(nnx.split(resized)[1])
    from jaxrec.ops.resize import bicubic

    params["position"] = bicubic(params["position"], (6, 8))
    x = images(12, 16)
    np.testing.assert_allclose(run(nnx.merge(graph, params), x), run(resized, x), atol=1e-5)
    del state


@pytest.mark.parametrize("pooling", ["corners", "mean", "sum", "center"])
def test_pooling(pooling):
    config = dataclasses.replace(SMALLEST, pooling=pooling)
    model = toy.drawn(config)
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 16)).astype(np.float32)
    want = {
        "corners": np.concatenate([x[:, 0, 0], x[:, -1, 0], x[:, 0, -1], x[:, -1, -1]], axis=-1),
        "mean": x.mean((1, 2)),
        "sum": x.sum((1, 2)),
        "center": x[:, 1, 2],
    }
    np.testing.assert_allclose(model._pooled(jnp.asarray(x)), want[pooling], atol=1e-5)
    assert model.head.kernel.shape[0] == 16 * (4 if pooling == "corners" else 1)


def test_channels_first_and_the_soft_cap():
    model = toy.drawn(SMALLEST)
    config = dataclasses.replace(SMALLEST, channels_first=True, logits_soft_cap=0.1)
    other = nnx.merge(
        nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))[0],
        nnx.to_pure_dict(nnx.split(model)[1]),
    )
    x = images(6, 8)
    capped = run(other, np.moveaxis(x, -1, 1))
    np.testing.assert_allclose(capped, 0.1 * np.tanh(run(model, x) / 0.1), atol=1e-6)


def test_dropping_needs_a_key():
    config = vision_config(width=16, heads=2, layers=1, patch=2, grid=(3, 4), classes=5, drop=0.5)
    model, x = toy.drawn(dataclasses.replace(config, drop=0.5)), images(6, 8)
    plain = run(model, x)
    first, again, other = (run(model, x, jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other) and np.any(first != plain)


def corners(count, seed):
    """A bright patch in one of two opposite corners, in noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count).astype(np.int32)
    x = 0.3 * rng.normal(size=(count, 6, 6, 1)).astype(np.float32)
    x[labels == 0, :2, :2] += 1
    x[labels == 1, 4:, 4:] += 1
    return Examples(x, labels)


@pytest.mark.slow
def test_it_learns_from_images():
    config = vision_config(
        width=16, heads=2, layers=1, patch=2, grid=(3, 3), classes=2, inputs=1, position=False
    )
    settings = ClassificationSettings(
        epochs=4, batch=16, optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=4)
    )
    data = ClassificationData(corners(96, 0), corners(40, 1))
    results = train_classifier(config, data, settings)
    assert results.losses[-1] < 0.5 * results.losses[0]
    assert results.accuracy >= 0.95


def test_sequences_are_no_images():
    config = vision_config(width=16, heads=2, layers=1, patch=2, grid=(3, 3), classes=2, inputs=1)
    examples = Examples(np.zeros((16, 6, 1), np.float32), np.zeros(16, np.int32))
    with pytest.raises(ValueError, match=r"inputs must be \(b x y 1\) and labels \(b\)"):
        train_classifier(config, ClassificationData(examples, examples), ClassificationSettings())
    image = corners(16, 0)._replace(lengths=np.ones(16, np.int32))
    with pytest.raises(ValueError, match="only sequences have lengths"):
        train_classifier(config, ClassificationData(image, image), ClassificationSettings())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 6, 7, 3), np.float32), "must be multiples of the patch's 2, got 6 x 7"),
        (np.zeros((2, 6, 8, 1), np.float32), r"images must be float \(b x y 3\), got float32"),
        (np.zeros((2, 6, 8, 3), np.uint8), r"images must be float \(b x y 3\), got uint8"),
        (np.zeros((6, 8, 3), np.float32), r"images must be float \(b x y 3\)"),
    ],
)
def test_bad_images_are_refused(x, message):
    model = toy.drawn(SMALLEST)
    with pytest.raises(ValueError, match=message):
        model(jnp.asarray(x))


def test_bad_configurations_are_refused():
    with pytest.raises(ValueError, match="pooling must be one of corners, mean, sum, center"):
        dataclasses.replace(SMALLEST, pooling="cls")
    with pytest.raises(ValueError, match=r"grid must be >= 1 patches, got \(0, 4\)"):
        dataclasses.replace(SMALLEST, grid=(0, 4))
    with pytest.raises(ValueError, match="first and second must have one width"):
        dataclasses.replace(
            SMALLEST,
            second=vision_config(
                width=32, heads=2, layers=1, patch=2, grid=(3, 4), classes=5
            ).second,
        )
