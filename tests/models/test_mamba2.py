"""The Mamba-2 language model where the laws and its fellows do not look: size, start, options."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrec.models import mamba2
from jaxrec.models.mamba2 import Mamba2Config
from tests import references
from tests.models import toy
from tests.models.toy import run

SMALLEST = Mamba2Config(
    vocab_size=13, width=16, layers=2, heads=4, head_width=6, state_size=5, groups=2, context=32
)
TOLERANCE = 5e-6  # ten times the gap between the plain loop in float32 and in float64, 5e-7
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 9), dtype=np.int32)


@pytest.mark.parametrize(
    "name, layers, d",
    [
        ("MAMBA2_130M", 24, 768),
        ("MAMBA2_370M", 48, 1024),
        ("MAMBA2_780M", 48, 1536),
        ("MAMBA2_1_3B", 48, 2048),
        ("MAMBA2_2_7B", 64, 2560),
    ],
)
def test_published_numbers_of_parameters(name, layers, d):
    """Per layer: projections, convolution with bias, three numbers a head, two norms."""
    e, n, h = 2 * d, 128, 2 * d // 64
    mixer = d * (2 * e + 2 * n + h) + 5 * (e + 2 * n) + 3 * h + e + e * d
    assert toy.parameters(getattr(mamba2, name)) == 50288 * d + d + layers * (mixer + d)


def test_initialisation():
    model = toy.initialised(dataclasses.replace(mamba2.TINY, shrink_output=True))
    mixer = model.blocks.mixer
    # A uniform number within 1 / sqrt(inputs) has the deviation 1 / sqrt(3 inputs).
    for kernel, std in (
        (model.embedding.table, 0.1),
        (mixer.input.kernel, (3 * 128) ** -0.5),
        (mixer.out.kernel, (3 * 9 * 256) ** -0.5),
    ):
        assert np.std(kernel[...]) == pytest.approx(std, rel=0.03)
    np.testing.assert_allclose(np.exp(mixer.log_rate[0]), np.arange(1, 9), rtol=1e-6)
    steps = jax.nn.softplus(mixer.step_bias[...])
    assert np.all(steps >= 0.999e-3) and np.all(steps <= 1.001e-1)


def test_every_option_equals_the_loop():
    config = dataclasses.replace(
        SMALLEST,
        bias=True,
        conv_bias=False,
        tie_embeddings=False,
        activation="gelu_tanh",
        step_limit=(0.6, 0.8),
    )
    model = toy.drawn(config)
    params = jax.device_get(nnx.to_pure_dict(nnx.split(model)[1]))
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    reset = np.zeros(TOKENS.shape, bool)
    want = references.mamba2(wide, TOKENS, reset, config, references.gelu)
    np.testing.assert_allclose(run(model, TOKENS)[0], want, atol=TOLERANCE)


def test_step_limits_hold_in_decoding_too():
    model = toy.drawn(dataclasses.replace(SMALLEST, step_limit=(0.6, 0.8)))
    whole, _ = run(model, TOKENS)
    state, parts = model.init_state(2), []
    for t in range(9):
        new, state = run(model, TOKENS[:, t : t + 1], state)
        parts.append(new)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=TOLERANCE)


@pytest.mark.parametrize("wide", [True, False])
def test_the_stream_is_float32_if_asked(wide):
    config = dataclasses.replace(SMALLEST, residual_in_float32=wide)
    small = jax.tree.map(lambda leaf: leaf.astype(jax.numpy.bfloat16), toy.drawn(config))
    assert small.embed(TOKENS).dtype == (np.float32 if wide else jax.numpy.bfloat16)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"layers": 0}, "layers must be >= 1, got 0"),
        ({"groups": 3}, "heads must be a multiple of groups, got 4 and 3"),
        ({"conv_width": 1}, "conv_width must be >= 2, got 1"),
        ({"step_min": 1.0}, "needs 0 < step_min <= step_max, got 1.0 and 0.1"),
        ({"step_limit": (0.2, 0.1)}, "step_limit needs 0 <= lowest < highest"),
        ({"activation": "swish"}, "there is no 'swish'"),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALLEST, **changed)
