"""The xLSTM language model: its size, start, options and bad input."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrec.models import xlstm
from jaxrec.models.xlstm import XLSTMConfig
from tests import references
from tests.models import toy
from tests.models.toy import run

SMALLEST = XLSTMConfig(
    vocab_size=13, width=16, layers=2, heads=2, key_width=8, value_width=12, mlp_width=24
)
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 9), dtype=np.int32)


def test_published_number_of_parameters():
    assert toy.parameters(xlstm.XLSTM_7B) == 6_865_424_896


@pytest.mark.parametrize("bias", [False, True])
def test_number_of_parameters(bias):
    d, h, k, v, f = 16, 2, 8, 12, 24
    kernels = d * (2 * k + 3 * v + 2 * h) + 3 * d * f
    biases = 2 * k + 2 * v + d + v + 2 * f + d + 2 * d
    block = kernels + 2 * h + 2 * d + v + bias * biases
    config = dataclasses.replace(SMALLEST, bias=bias)
    assert toy.parameters(config) == 2 * 13 * d + d + 2 * block


def test_initialisation():
    model = toy.initialised(xlstm.TINY)
    for kernel, std in (
        (model.embedding.table, (2 / (5 * 128)) ** 0.5),
        (model.head.table, (2 / (5 * 128)) ** 0.5),
        (model.blocks.mixer.query.kernel, (2 / (5 * 128)) ** 0.5),
        (model.blocks.mixer.out.kernel, 2 / 4 / 128**0.5),
        (model.blocks.mlp.out.kernel, 2 / 4 / 320**0.5),
    ):
        assert np.std(kernel[...]) == pytest.approx(std, rel=0.03)


def test_every_option_equals_the_loop():
    config = dataclasses.replace(
        SMALLEST,
        bias=True,
        gate_soft_cap=0.5,
        logits_soft_cap=0.1,
        norm_epsilon=1e-2,
        epsilon=1e-1,
        chunk=2,
    )
    model = toy.drawn(config)
    params = jax.device_get(nnx.to_pure_dict(nnx.split(model)[1]))
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    want = references.xlstm(wide, TOKENS, np.zeros(TOKENS.shape, bool), config)
    # Ten times the gap between the plain loop in float32 and in float64, 5e-8.
    np.testing.assert_allclose(run(model, TOKENS)[0], want, atol=5e-7)
    assert np.max(np.abs(want)) < 0.1


def test_what_is_stored_in_one_changes_nothing():
    model = toy.drawn(SMALLEST)
    fused = toy.drawn(dataclasses.replace(SMALLEST, weight_mode="fused"))
    np.testing.assert_array_equal(run(model, TOKENS)[0], run(fused, TOKENS)[0])


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"layers": 0}, "layers must be >= 1, got 0"),
        ({"chunk": 0}, "chunk must be >= 1, got 0"),
        ({"key_width": 7}, "key_width must be a multiple of heads, got 7 and 2"),
        ({"value_width": 0}, "value_width must be a multiple of heads, got 0 and 2"),
        ({"weight_mode": "double"}, "weight_mode must be one of single, fused, got 'double'"),
        ({"gate_soft_cap": 0.0}, "gate_soft_cap must be > 0, got 0.0"),
        ({"logits_soft_cap": -1.0}, "logits_soft_cap must be > 0, got -1.0"),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    with pytest.raises(ValueError, match=f"XLSTMConfig: {message}"):
        dataclasses.replace(SMALLEST, **changed)
