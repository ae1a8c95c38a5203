"""The Mamba language model: its size, start, packing, state and training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.models import mamba
from jaxrec.models.mamba import MambaConfig
from tests import references
from tests.models import toy
from tests.models.toy import run

SMALLEST = MambaConfig(
    vocab_size=13, width=16, layers=2, inner_width=24, step_rank=3, state_size=4, context=32
)
TOLERANCE = 5e-6  # ten times the gap between the plain loop in float32 and in float64, 5e-7
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 9), dtype=np.int32)


@pytest.fixture(scope="module")
def model():
    return toy.drawn(SMALLEST)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("MAMBA_130M", 129_135_360),
        ("MAMBA_370M", 371_516_416),
        ("MAMBA_790M", 793_204_224),
        ("MAMBA_1_4B", 1_372_178_432),
        ("MAMBA_2_8B", 2_768_345_600),
    ],
)
def test_published_numbers_of_parameters(name, parameters):
    assert toy.parameters(getattr(mamba, name)) == parameters


def test_number_of_parameters_with_every_option():
    config = dataclasses.replace(SMALLEST, bias=True, conv_bias=False, tie_embeddings=False)
    d, e, n, r = 16, 24, 4, 3
    mixer = 2 * d * e + 2 * e + 4 * e + e * (r + 2 * n) + r * e + e + e * n + e + e * d + d
    assert toy.parameters(config) == 2 * 13 * d + d + 2 * (d + mixer)


def test_initialisation():
    config = dataclasses.replace(mamba.TINY, shrink_output=True)
    model = toy.initialised(config)
    # A uniform number within 1 / sqrt(inputs) has the deviation 1 / sqrt(3 inputs).
    for kernel, std in (
        (model.embedding.table, 0.1),
        (model.blocks.mixer.input.kernel, (3 * 128) ** -0.5),
        (model.blocks.mixer.step.kernel, (3 * 8) ** -0.5),
        (model.blocks.mixer.out.kernel, (3 * 8 * 256) ** -0.5),
    ):
        assert np.std(kernel[...]) == pytest.approx(std, rel=0.03)
    assert np.max(np.abs(model.blocks.mixer.step.kernel[...])) <= 8**-0.5
    constant = dataclasses.replace(SMALLEST, step_init="constant", step_scale=2.0)
    kernel = toy.initialised(constant).blocks.mixer.step.kernel[...]
    np.testing.assert_allclose(kernel, 2 * 3**-0.5, rtol=1e-6)


def test_every_option_equals_the_loop():
    config = dataclasses.replace(
        SMALLEST, bias=True, conv_bias=False, tie_embeddings=False, activation="gelu_tanh"
    )
    model = toy.drawn(config)
    params = jax.device_get(nnx.to_pure_dict(nnx.split(model)[1]))
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    reset = np.zeros(TOKENS.shape, bool)
    want = references.mamba(wide, TOKENS, reset, config, references.gelu)
    np.testing.assert_allclose(run(model, TOKENS)[0], want, atol=TOLERANCE)


@pytest.mark.parametrize("wide", [True, False])
def test_bfloat16_weights_keep_a_float32_state(wide):
    config = dataclasses.replace(SMALLEST, residual_in_float32=wide)
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), toy.drawn(config))
    logits, state = run(small, TOKENS)
    assert logits.dtype == state.blocks.hidden.dtype == state.blocks.window.dtype == jnp.float32
    assert small.embed(TOKENS).dtype == (jnp.float32 if wide else jnp.bfloat16)
    want, _ = run(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), small), TOKENS)
    # Measured: 0.8 epsilon of the largest logit.
    np.testing.assert_allclose(logits, want, atol=1.5 * 2.0**-7 * np.max(np.abs(want)))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"layers": 0}, "layers must be >= 1, got 0"),
        ({"conv_width": 1}, "conv_width must be >= 2, got 1"),
        ({"step_min": 1.0}, "needs 0 < step_min <= step_max, got 1.0 and 0.1"),
        ({"step_init": "zero"}, "step_init must be one of random, constant, got 'zero'"),
        ({"activation": "swish"}, "there is no 'swish'"),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALLEST, **changed)
