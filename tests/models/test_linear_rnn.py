"""The RG-LRU language model: its size, start, packing, state and training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.models.linear_rnn import SMALL, TINY, LinearRNNConfig
from tests.laws import equations
from tests.models import toy

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


@functools.partial(jax.jit, static_argnames="remat")
def run(model, tokens, state=None, *, remat="none", **options):
    return model(tokens, state, remat=remat, **options)


def test_number_of_parameters():
    """Per layer: two norms, three projections, two gates, convolution, decay and a gated MLP."""
    for config in (TINY, SMALL, SMALLEST):
        model = nnx.eval_shape(lambda config=config: config.build(rngs=nnx.Rngs(0)))
        d, e, f = config.width, config.recurrent_width, config.mlp_width
        recurrent = 3 * d * e + 2 * e + d + 2 * (e**2 // config.heads + e) + 5 * e + e
        layer = 2 * d + recurrent + 3 * d * f + 2 * f + d
        total = config.vocab_size * d + d + config.layers * layer
        assert sum(leaf.size for leaf in jax.tree.leaves(nnx.split(model)[1])) == total


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


def test_packed_documents_equal_separate_ones(model):
    packed = np.concatenate([TOKENS[:1, :5], TOKENS[1:, :4]], axis=1)
    logits, _ = run(model, packed, segment_ids=np.array([[1] * 5 + [2] * 4], np.int32))
    for row, begin, end in ((0, 0, 5), (1, 5, 9)):
        alone, _ = run(model, TOKENS[row : row + 1, : end - begin])
        np.testing.assert_allclose(logits[:, begin:end], alone, atol=TOLERANCE)


def test_decoding_token_by_token_equals_the_full_pass(model):
    whole, _ = run(model, TOKENS)
    state, parts = model.init_state(2, capacity=1), []
    for t in range(9):
        new, state = run(model, TOKENS[:, t : t + 1], state)
        parts.append(new)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=TOLERANCE)


def test_left_padded_prompts_equal_unpadded_ones(model):
    ids = np.ones((2, 8), np.int32)
    ids[0, :4] = 0
    logits, state = run(model, TOKENS[:, :8], model.init_state(2), segment_ids=ids)
    last, _ = run(model, TOKENS[:, 8:], state)
    alone, _ = run(model, TOKENS[:1, 4:])
    np.testing.assert_allclose(logits[:1, 4:], alone[:, :4], atol=TOLERANCE)
    np.testing.assert_allclose(last[:1], alone[:, 4:], atol=TOLERANCE)
    np.testing.assert_allclose(last[1:], run(model, TOKENS)[0][1:, 8:], atol=TOLERANCE)


def test_the_state_does_not_grow_with_the_tokens_seen(model):
    start = model.init_state(2, capacity=1000)
    _, state = jax.eval_shape(lambda model, tokens: model(tokens), model, TOKENS)
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, state)
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(state))


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


def test_bfloat16_weights_keep_a_float32_state(model):
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    logits, state = run(small, TOKENS)
    assert logits.dtype == state.blocks.hidden.dtype == state.blocks.window.dtype == jnp.float32
    want, _ = run(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), small), TOKENS)
    # Measured: 0.7 epsilon of the largest logit.
    np.testing.assert_allclose(logits, want, atol=1 * 2.0**-7 * np.max(np.abs(want)))


def test_remat_changes_no_gradient(model):
    @functools.partial(jax.jit, static_argnames="remat")
    def gradient(model, remat):
        return jax.grad(lambda model: jnp.mean(model(TOKENS, remat=remat)[0] ** 2))(model)

    want = jax.tree.leaves(gradient(model, "none"))
    for remat in ("block", "sqrt"):
        for left, right in zip(jax.tree.leaves(gradient(model, remat)), want, strict=True):
            np.testing.assert_allclose(left, right, atol=1e-5 * np.max(np.abs(right)))


def test_the_trace_does_not_grow_with_layers():
    def trace(layers):
        config = dataclasses.replace(SMALLEST, layers=layers)
        model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
        return equations(jax.make_jaxpr(lambda model: model(TOKENS)[0])(model).jaxpr)

    assert trace(2) == trace(8)


def test_twenty_steps_lower_the_loss():
    """Logits begin as large as the tied embedding makes those of the present token: about 4."""
    values = toy.losses(toy.initialised(SMALLEST), toy.counting(13))
    assert values[0] < 6
    assert values[-1] < 0.6 * values[0]


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
