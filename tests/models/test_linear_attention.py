"""Language models of linear attention: their sizes and options; what all recurrent models do is in
test_recurrent_lms.py, their values in the laws."""

import dataclasses

import numpy as np
import pytest

from jaxrec.models import linear_attention
from jaxrec.models.linear_attention import LinearAttentionConfig
from tests.models import toy

SMALLEST = LinearAttentionConfig(
    vocab_size=13, width=16, heads=2, key_width=4, value_width=6, mlp_width=24, layers=2
)


def expected(config):
    """Per layer: two norms, q, k, v and out, what the options add, and a gated MLP."""
    d, h, k, v = config.width, config.heads, config.key_width, config.value_width
    mixer = 2 * d * h * k + 2 * d * h * v + v + config.output_gate * d * h * v
    mixer += config.conv_width * h * (2 * k + v) if config.conv_width else 0
    mixer += d * h if config.rule == "delta" else 0
    low_rank = config.gate_rank * (d + h * k) + h * k
    mixer += {
        "none": 0,
        "constant": 0,
        "logistic": low_rank,
        "step": d * h + 2 * h,
        "key_step": low_rank + h,
    }[config.gate]
    heads = 1 if config.tie_embeddings else 2
    layer = 2 * d + mixer + 3 * d * config.mlp_width
    return heads * config.vocab_size * d + d + config.layers * layer


@pytest.mark.parametrize(
    "name, millions",
    [
        ("RETNET_TINY", 1.0),
        ("GLA_TINY", 1.0),
        ("DELTANET_TINY", 1.0),
        ("GATED_DELTANET_TINY", 1.0),
        ("GLA_1_3B", 1365),
        ("DELTANET_1_3B", 1365),
        ("GATED_DELTANET_1_3B", 1387),
    ],
)
def test_number_of_parameters(name, millions):
    config = getattr(linear_attention, name)
    assert toy.parameters(config) == expected(config)
    assert toy.parameters(config) / 1e6 == pytest.approx(
        millions, rel=0.03 if millions == 1 else 1e-3
    )


def test_number_of_parameters_with_the_other_options():
    config = dataclasses.replace(SMALLEST, rule="delta", gate="key_step", conv_width=3)
    assert toy.parameters(config) == expected(config)


def test_initialisation():
    model = toy.initialised(linear_attention.GATED_DELTANET_TINY)
    cut = 0.9866  # what the cut at three deviations leaves of the deviation
    for kernel, std in (
        (model.embedding.table, 128**-0.5),
        (model.blocks.mixer.query.kernel, 128**-0.5),
        (model.blocks.mixer.output_gate.kernel, 128**-0.5),
        (model.blocks.mixer.out.kernel, (2 * 4 * 3 * 64) ** -0.5),
        (model.blocks.mlp.out.kernel, (2 * 4 * 384) ** -0.5),
    ):
        assert np.std(kernel[...]) == pytest.approx(std * cut, rel=0.03)


def test_flops_count_every_matrix():
    d, h, k, v, f = 16, 2, 4, 6, 24
    scan = h * (64 * (k + v) + 2 * k * v)
    layer = 2 * d * h * k + 3 * d * h * v + scan + 3 * d * f
    assert SMALLEST.flops_per_token(100) == 2 * (2 * layer + d * 13)
    assert SMALLEST.flops_per_token(100, training=True) == 3 * SMALLEST.flops_per_token(100)
    delta = dataclasses.replace(SMALLEST, rule="delta")
    more = h * (d + 64 * (3 * k + v) + k * k)
    assert delta.flops_per_token(100) - SMALLEST.flops_per_token(100) == 2 * 2 * more


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"layers": 0}, "layers must be >= 1, got 0"),
        ({"conv_width": 1}, "conv_width must be >= 2, got 1"),
        ({"rule": "hebb"}, "rule must be one of gated, delta, got 'hebb'"),
        ({"gate": "vector"}, "gate must be one of none, constant, .*, got 'vector'"),
        ({"rotary_base": 10.0, "key_width": 5}, "key_width must be even to be rotated, got 5"),
        ({"beta_scale": 2.5}, r"beta_scale must be in \(0, 2\], got 2.5"),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    with pytest.raises(ValueError, match=f"^LinearAttentionConfig: {message}"):
        dataclasses.replace(SMALLEST, **changed)
