"""The vision transformer: its size, that patches see all others, other resolutions, pooling."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrec.config import from_dict, to_dict
from jaxrec.layers.axes import mesh_axes
from jaxrec.models.vit import VIT_T, ViTConfig
from tests import references
from tests.models import toy

SMALLEST = ViTConfig(
    classes=5, width=8, heads=2, layers=2, mlp_width=12, patch=2, grid=(2, 3), inputs=1
)


def images(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(2, *shape, 1)).astype(np.float32)


@jax.jit
def run(model, x):
    return model(x)


def norm(x, params):
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return y * params["scale"] + params["bias"]


def affine(x, params):
    return np.tensordot(x, params["kernel"], axes=1) + params["bias"]


def plain(model, images, pooling):
    """The model, written out in NumPy and float64."""
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.split(model)[1])
    )
    batch, x, y, _ = images.shape
    cut = images.astype(np.float64).reshape(batch, x // 2, 2, y // 2, 2, 1).swapaxes(2, 3)
    cut = cut.reshape(batch, x // 2, y // 2, 4)
    stream = cut @ params["patch_kernel"].reshape(4, -1) + params["patch_bias"]
    stream = (stream + params["position"]).reshape(batch, -1, stream.shape[-1])
    if pooling == "class":
        token = np.broadcast_to(params["class_token"], (batch, 1, stream.shape[-1]))
        stream = np.concatenate([token, stream], axis=1)
    everything = np.ones((batch, *stream.shape[1:2] * 2), bool)
    for i in range(2):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        normed = norm(stream, block["mixer_norm"])
        kv = affine(normed, block["mixer"]["key_value"])
        q = affine(normed, block["mixer"]["query"])
        mixed = references.attend(q, kv[:, :, 0], kv[:, :, 1], everything)
        stream = stream + affine(mixed.reshape(stream.shape), block["mixer"]["out"])
        inner = affine(norm(stream, block["mlp_norm"]), block["mlp"]["up"])
        exact = np.vectorize(lambda z: z * (1 + math.erf(z / 2**0.5)) / 2)
        stream = stream + affine(exact(inner), block["mlp"]["out"])
    stream = norm(stream, params["norm"])
    pooled = stream[:, 0] if pooling == "class" else stream.mean(1)
    return affine(pooled, params["head"])


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_equals_the_formulas(pooling):
    model = toy.drawn(dataclasses.replace(SMALLEST, pooling=pooling))
    x = images(4, 6)
    # Ten times the float32-float64 gap of numbers around 1.
    np.testing.assert_allclose(run(model, x), plain(model, x, pooling), atol=5e-6)


def test_published_number_of_parameters():
    """DeiT-T at 224 has 5,717,416, 192 of them the class token's position."""
    assert toy.parameters(VIT_T) == 5_717_416 - 192


def test_other_resolutions():
    assert run(toy.drawn(SMALLEST), images(8, 6)).shape == (2, 5)


def test_the_configuration_round_trips_and_parameters_name_their_axes():
    assert from_dict(ViTConfig, json.loads(json.dumps(to_dict(SMALLEST)))) == SMALLEST
    model = nnx.eval_shape(lambda: SMALLEST.build(rngs=nnx.Rngs(0)))
    for path, leaf in nnx.to_flat_state(nnx.split(model)[1]):
        axes = leaf.get_metadata("axes")
        assert len(leaf.shape) == len(axes) + (path[0] == "blocks"), path
        mesh_axes(axes)


def test_bad_configurations_and_images_are_refused():
    with pytest.raises(ValueError, match="pooling must be one of class, mean, got 'corners'"):
        dataclasses.replace(SMALLEST, pooling="corners")
    with pytest.raises(ValueError, match="width must be a multiple of heads, got 8 and 3"):
        dataclasses.replace(SMALLEST, heads=3)
    with pytest.raises(ValueError, match=r"grid must be >= 1 patches, got \(2, 0\)"):
        dataclasses.replace(SMALLEST, grid=(2, 0))
    model = toy.drawn(SMALLEST)
    with pytest.raises(ValueError, match="images have no lengths"):
        model(images(4, 6), np.ones(2, np.int32))
    with pytest.raises(ValueError, match="must be multiples of the patch's 2, got 4 x 5"):
        model(images(4, 5))
