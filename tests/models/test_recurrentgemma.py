"""RecurrentGemma: its size, pattern, packing, state past the window, and training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.models.recurrentgemma import RECURRENTGEMMA_2B, RecurrentGemmaConfig
from tests.models import toy
from tests.models.toy import run

SMALLEST = RecurrentGemmaConfig(
    vocab_size=13,
    width=16,
    recurrent_width=12,
    heads=2,
    mlp_width=24,
    layers=4,
    window=4,
    context=32,
    pattern=("recurrent", "recurrent", "attention"),
)
TOLERANCE = 5e-6  # ten times the gap between the plain loop in float32 and in float64, 5e-7
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 11), dtype=np.int32)


@pytest.fixture(scope="module")
def model():
    return toy.drawn(SMALLEST)


def test_published_number_of_parameters():
    """26 layers, of which 8 are attention: 2560 x (2 x 2560 + 2 x 256) + 2560 each."""
    total = toy.parameters(RECURRENTGEMMA_2B)
    assert total == 2_682_862_080
    d, f = 2560, 7680
    mlp = 3 * d * f + 2 * f + d
    recurrent = 3 * d * d + 3 * d + 2 * (d * d // 10 + d) + 5 * d + d
    attention = d * (2 * d + 2 * 256) + d
    assert total == 256000 * d + d + 26 * (mlp + 2 * d) + 18 * recurrent + 8 * attention


@pytest.mark.parametrize(
    "pattern, layers, window",
    [
        (("recurrent", "recurrent", "attention"), 2, 4),  # cut short before its attention
        (("recurrent", "attention"), 3, 4),
        (("attention",), 2, 4),
        (("recurrent",), 2, 4),
        (("recurrent", "attention"), 2, 100),  # a window that is never full
    ],
)
def test_decoding_equals_the_full_pass_past_the_window(pattern, layers, window):
    config = dataclasses.replace(SMALLEST, pattern=pattern, layers=layers, window=window)
    model = toy.drawn(config)
    whole, nothing = run(model, TOKENS)
    assert nothing is None
    for sizes in ([1] * 11, [6, 1, 1, 3]):  # three tokens at once wrap round the ring
        state, begin, parts = model.init_state(2, capacity=11), 0, []
        for size in sizes:
            new, state = run(model, TOKENS[:, begin : begin + size], state)
            parts.append(new)
            begin += size
        np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=TOLERANCE)


def test_attention_sees_the_window_and_no_more():
    """Without recurrence, a token changes its own logits and those of the window - 1 after it."""
    model = toy.drawn(dataclasses.replace(SMALLEST, pattern=("attention",), layers=1))
    other = TOKENS.copy()
    other[:, 2] = (other[:, 2] + 1) % 13
    changed = np.any(run(model, TOKENS)[0] != run(model, other)[0], axis=(0, 2))
    np.testing.assert_array_equal(changed, [2 <= t < 2 + 4 for t in range(11)])


def test_the_state_is_bounded_by_the_window(model):
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(model.init_state(2, capacity=capacity)))
        for capacity in (2, 4, 1000)
    ]
    assert sizes[0] < sizes[1] == sizes[2]
    start = model.init_state(2, capacity=1000)
    _, state = jax.eval_shape(lambda model, tokens: model(tokens, start), model, TOKENS)
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, state)


def test_the_embedding_is_scaled_by_a_bfloat16_number(model):
    assert RECURRENTGEMMA_2B.embedding_scale == 50.5  # sqrt(2560) = 50.596
    np.testing.assert_array_equal(model.embed(TOKENS), 4 * model.embedding(TOKENS))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"heads": 3}, "width must be a multiple of heads, got 16 and 3"),
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads, got 2 and 3"),
        ({"window": 0}, "window must be >= 1, got 0"),
        ({"conv_width": 1}, "conv_width must be >= 2, got 1"),
        ({"pattern": ()}, r"pattern must be made of .*got \(\)"),
        ({"pattern": ("mamba",)}, r"pattern must be made of .*got \('mamba',\)"),
        ({"rotary_fraction": 0.4}, "must be an even number of channels, got 0.4 of 8"),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALLEST, **changed)
