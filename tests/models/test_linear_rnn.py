"""The RG-LRU language model: its size, start, packing, state and training."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from jaxrec.models.linear_rnn import SMALL, TINY, LinearRNNConfig
from tests.models import toy
from tests.models.toy import run

SMALLEST = LinearRNNConfig(
    vocab_size=13,
    width=16,
    recurrent_width=12,
    heads=2,
    mlp_width=24,
    layers=2,
    context=32,
)
TOLERANCE = 5e-6  # ten times the gap between the plain loop in float32 and in float64, 4.3e-7
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 9), dtype=np.int32)


@pytest.fixture(scope="module")
def model():
    return toy.drawn(SMALLEST)


def test_number_of_parameters():
    """Per layer: two norms, three projections, two gates, convolution, decay and a gated MLP."""
    for config in (TINY, SMALL, SMALLEST):
        d, e, f = config.width, config.recurrent_width, config.mlp_width
        recurrent = 3 * d * e + 2 * e + d + 2 * (e**2 // config.heads + e) + 5 * e + e
        layer = 2 * d + recurrent + 3 * d * f + 2 * f + d
        total = config.vocab_size * d + d + config.layers * layer
        assert toy.parameters(config) == total


def test_initialisation():
    model = toy.initialised(TINY)
    cut = 0.9866  # what the cut at three deviations leaves of the deviation
    for kernel, std in (
        (model.embedding.table, 128**-0.5),
        (model.blocks.mixer.input.kernel, 128**-0.5),
        (model.blocks.mixer.out.kernel, (2 * 4 * 192) ** -0.5),
        (model.blocks.mlp.gate.kernel, 128**-0.5),
        (model.blocks.mlp.out.kernel, (2 * 4 * 384) ** -0.5),
    ):
        assert np.std(kernel[...]) == pytest.approx(std * cut, rel=0.03)
    assert not np.any(model.blocks.mixer_norm.scale[...])


@pytest.mark.parametrize("cap", [None, 2.0])
def test_logits_are_capped(model, cap):
    plain, _ = run(nnx_with(model, None), TOKENS)
    logits, _ = run(nnx_with(model, cap), TOKENS)
    want = plain if cap is None else cap * np.tanh(plain / np.float32(cap))
    np.testing.assert_allclose(logits, want, atol=TOLERANCE)


def nnx_with(model, cap):
    """The same parameters under another cap."""
    config = dataclasses.replace(SMALLEST, logits_soft_cap=cap)
    graph, _ = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    return nnx.merge(graph, nnx.split(model)[1])


def test_flops_count_every_matrix():
    d, e, f = 16, 12, 24
    layer = 3 * d * e + 2 * e**2 // 2 + 4 * e + 3 * d * f
    assert SMALLEST.flops_per_token(32) == 2 * (2 * layer + d * 13)
    assert SMALLEST.flops_per_token(32, training=True) == 3 * SMALLEST.flops_per_token(1000)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": 5}, r"recurrent_width must be a multiple of heads, got 12 and 5"),
        ({"layers": 0}, r"layers must be >= 1, got 0"),
        ({"conv_width": 1}, r"conv_width must be >= 2, got 1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=f"^LinearRNNConfig: {message}"):
        dataclasses.replace(SMALLEST, **change)
