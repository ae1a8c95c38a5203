"""What every language model of recurrent blocks does, recurrent in time or in depth: packing,
streaming, a state of one size, gradients whatever is kept for them, and learning.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.models.linear_attention import LinearAttentionConfig
from jaxrec.models.linear_rnn import LinearRNNConfig
from jaxrec.models.mamba import MambaConfig
from jaxrec.models.mamba2 import Mamba2Config
from jaxrec.models.pararnn import ParaRNNLMConfig
from jaxrec.models.plstm import lm_config
from jaxrec.models.prefix_linear import PrefixLMConfig
from jaxrec.models.recurrentgemma import RecurrentGemmaConfig
from jaxrec.models.rnn import RNNConfig
from jaxrec.models.rwkv import RWKVConfig
from jaxrec.models.ssm import SSMConfig
from jaxrec.models.universal_transformer import UniversalTransformerConfig
from jaxrec.models.xlstm import XLSTMConfig
from tests.laws import equations
from tests.models import toy
from tests.models.toy import run

LINEAR_ATTENTION = LinearAttentionConfig(
    vocab_size=13,
    width=16,
    heads=2,
    key_width=4,
    value_width=6,
    mlp_width=24,
    layers=2,
    chunk=4,
    context=32,
)
RETNET = {"gate": "constant", "rotary_base": 100.0}
GATED_DELTANET = {"rule": "delta", "gate": "step", "conv_width": 4}
S5 = SSMConfig(vocab_size=13, width=16, state_size=4, layers=2, mlp_width=24, context=32)
PARA_GRU = ParaRNNLMConfig(vocab_size=13, width=16, layers=2, heads=2, mlp_width=24)
CONFIGS = [
    dataclasses.replace(LINEAR_ATTENTION, **RETNET),
    dataclasses.replace(LINEAR_ATTENTION, gate="logistic", gate_rank=3),
    dataclasses.replace(LINEAR_ATTENTION, **GATED_DELTANET),
    LinearRNNConfig(
        vocab_size=13, width=16, recurrent_width=12, heads=2, mlp_width=24, layers=2, context=32
    ),
    MambaConfig(vocab_size=13, width=16, layers=2, inner_width=24, step_rank=3, state_size=4),
    Mamba2Config(vocab_size=13, width=16, layers=2, heads=4, head_width=6, state_size=5),
    PARA_GRU,
    dataclasses.replace(PARA_GRU, cell="lstm"),
    lm_config(vocab_size=13, width=8, layers=2, heads=2, context=32),
    PrefixLMConfig(
        vocab_size=13,
        width=16,
        mixers=("conv", "linear", "attention", "conv"),
        heads=2,
        mlp_width=24,
        feature_width=3,
        window=4,
        context=32,
    ),
    RecurrentGemmaConfig(
        vocab_size=13,
        width=16,
        recurrent_width=12,
        heads=2,
        mlp_width=24,
        layers=4,
        window=4,
        context=32,
    ),
    RNNConfig(vocab_size=13, width=16, layers=2, mlp_width=24),
    RWKVConfig(vocab_size=13, width=16, layers=2, inner_width=12, mlp_width=24),
    S5,
    dataclasses.replace(S5, kind="s4d"),
    dataclasses.replace(S5, kind="lssl"),
    UniversalTransformerConfig(
        vocab_size=13,
        width=16,
        heads=2,
        mlp_width=24,
        steps=4,
        context=32,
        transition="conv",
        halting="position",
        rule="copy-halted",
    ),
    XLSTMConfig(
        vocab_size=13,
        width=16,
        layers=2,
        heads=2,
        key_width=8,
        value_width=12,
        mlp_width=24,
        norm_epsilon=1e-2,  # a head's few channels may be almost alike, which amplifies rounding
    ),
]
TOLERANCE = 5e-6  # ten times the gap between the plain loops in float32 and in float64, 5e-7
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 11), dtype=np.int32)


def named(config):
    kind = [
        getattr(config, field)
        for field in ("rule", "gate", "cell", "kind")
        if hasattr(config, field)
    ]
    return " ".join([type(config).__name__, *kind])


SAMPLE = (
    LinearRNNConfig,
    PrefixLMConfig,
    RecurrentGemmaConfig,
    UniversalTransformerConfig,
)  # one of each way to stack blocks
configs = pytest.mark.parametrize("config", CONFIGS, ids=named)
sample_first = pytest.mark.parametrize(
    "config",
    [
        pytest.param(c, id=named(c), marks=() if isinstance(c, SAMPLE) else pytest.mark.slow)
        for c in CONFIGS
    ],
)


@pytest.fixture
def model(config):
    return toy.drawn(config)


@sample_first
def test_packed_documents_equal_separate_ones(config, model):
    packed = np.concatenate([TOKENS[:1, :5], TOKENS[1:, :6]], axis=1)
    logits, _ = run(model, packed, segment_ids=np.array([[1] * 5 + [2] * 6], np.int32))
    for row, begin, end in ((0, 0, 5), (1, 5, 11)):
        alone, _ = run(model, TOKENS[row : row + 1, : end - begin])
        np.testing.assert_allclose(logits[:, begin:end], alone, atol=TOLERANCE)


@configs
def test_decoding_token_by_token_equals_the_full_pass(config, model):
    whole, _ = run(model, TOKENS)
    state, parts = model.init_state(2, capacity=11), []
    for t in range(11):
        new, state = run(model, TOKENS[:, t : t + 1], state)
        parts.append(new)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=TOLERANCE)


@sample_first
def test_left_padded_prompts_equal_unpadded_ones(config, model):
    ids = np.ones((2, 10), np.int32)
    ids[0, :4] = 0
    state = model.init_state(2, capacity=11)
    logits, state = run(model, TOKENS[:, :10], state, segment_ids=ids)
    last, _ = run(model, TOKENS[:, 10:], state)
    alone, _ = run(model, TOKENS[:1, 4:])
    np.testing.assert_allclose(logits[:1, 4:], alone[:, :6], atol=TOLERANCE)
    np.testing.assert_allclose(last[:1], alone[:, 6:], atol=TOLERANCE)
    np.testing.assert_allclose(last[1:], run(model, TOKENS)[0][1:, 10:], atol=TOLERANCE)


@configs
def test_the_state_keeps_its_size_and_is_float32(config, model):
    start = model.init_state(2, capacity=1000)
    _, state = jax.eval_shape(lambda model, tokens: model(tokens, start), model, TOKENS)
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, state)
    others = (jnp.complex64, jnp.int32, jnp.bool_)  # complex64 is two float32
    assert all(leaf.dtype in (jnp.float32, *others) for leaf in jax.tree.leaves(state))


@configs
def test_a_state_of_another_batch_is_refused(config, model):
    state = model.init_state(3, capacity=4)
    with pytest.raises(ValueError, match=r"holds 3 sequences, but 2 came\. .*init_state\(2\)"):
        jax.eval_shape(model, np.zeros((2, 4), np.int32), state)


@sample_first
def test_bfloat16_weights_keep_a_float32_state_and_stay_close(config, model):
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    logits, state = run(small, TOKENS, small.init_state(2, capacity=11))
    assert logits.dtype == jnp.float32
    fresh = jax.tree.leaves(small.init_state(2, capacity=11))
    for leaf, like in zip(jax.tree.leaves(state), fresh, strict=True):
        assert leaf.dtype == like.dtype
    want, _ = run(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), small), TOKENS)
    # Measured, in bfloat16's epsilon of the largest logit: 0.6 to 1.0; ParaRNNs, which normalise
    # the small states behind their cells, 1.9 and 2.7.
    allowed = 4.0 if isinstance(config, ParaRNNLMConfig) else 1.5
    np.testing.assert_allclose(logits, want, atol=allowed * 2.0**-7 * np.max(np.abs(want)))


@sample_first
def test_remat_changes_no_gradient(config, model):
    @functools.partial(jax.jit, static_argnames="remat")
    def gradient(model, remat):
        return jax.grad(lambda model: jnp.mean(model(TOKENS, remat=remat)[0] ** 2))(model)

    want = jax.tree.leaves(gradient(model, "none"))
    for remat in ("dots", "block", "sqrt"):
        for left, right in zip(jax.tree.leaves(gradient(model, remat)), want, strict=True):
            np.testing.assert_allclose(left, right, atol=1e-5 * np.max(np.abs(right)))


@pytest.mark.parametrize(
    "config",
    [config for config in CONFIGS if hasattr(config, "layers")],  # and not one entry per layer
    ids=lambda config: type(config).__name__,
)
def test_the_trace_does_not_grow_with_layers(config):
    def trace(factor):
        taller = dataclasses.replace(config, layers=6 * factor)
        model = nnx.eval_shape(lambda: taller.build(rngs=nnx.Rngs(0)))
        return equations(jax.make_jaxpr(lambda model: model(TOKENS)[0])(model).jaxpr)

    assert trace(1) == trace(3)


@sample_first
def test_twenty_steps_lower_the_loss(config):
    values = toy.losses(toy.initialised(config), toy.counting(13))
    assert values[0] < 6  # logits are not large at the start, about log 13 = 2.6
    assert np.mean(values[-3:]) < 0.8 * values[0]
