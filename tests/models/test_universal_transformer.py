"""The Universal Transformer's size, coordinates, halting, cache, source and training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.errors import UserError
from jaxrec.generation import STOPPED, translate
from jaxrec.models.protocol import LanguageModelConfig
from jaxrec.models.universal_transformer import (
    TINY,
    UT_BASE,
    UT_BIG,
    UT_SMALL,
    UT_TINY,
    UniversalEncoderConfig,
    UniversalSeq2SeqConfig,
    UniversalTransformerConfig,
    adaptive,
)
from tests import references
from tests.models import toy
from tests.models.toy import run

SIZES = {"vocab_size": 13, "width": 16, "heads": 2, "mlp_width": 24, "steps": 5, "context": 32}
SMALLEST = UniversalTransformerConfig(**SIZES)
ADAPTIVE = dataclasses.replace(SMALLEST, halting="position")
SEQ2SEQ = UniversalSeq2SeqConfig(**SIZES, halting="position", rule="copy-halted", layers_before=1)
ENCODER = UniversalEncoderConfig(**SIZES, transition="conv", halting="row")
TOLERANCE = 5e-6  # ten times the gap between the plain loop in float32 and in float64, 5e-7
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 9), dtype=np.int32)
SOURCE = np.random.default_rng(1).integers(0, 13, (2, 6), dtype=np.int32)
NO_RESET = np.zeros((2, 9), bool)


def halting_late(config, bias=-4.0, factor=5):
    """The drawn model with a halting unit under which positions halt at different loops."""
    model = toy.drawn(config)
    graph, state = nnx.split(model)
    state = nnx.to_pure_dict(state)
    for stack in ("encoder", "decoder"):
        if stack in state:
            unit = state[stack]["halt"]
            state[stack] = state[stack] | {
                "halt": {"kernel": unit["kernel"] * factor, "bias": jnp.full(1, bias)}
            }
    return nnx.merge(graph, state)


def numbers(model):
    """The parameters as float64."""
    pure = nnx.to_pure_dict(nnx.split(model)[1])
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), pure)


def reference(model, tokens, offset=0):
    return references.universal_transformer(
        numbers(model), tokens, np.zeros(tokens.shape, bool), model.config, offset
    )


# Size and start


def layer_parameters(config, norms):
    """Attentions without biases, a transition with them, and norms."""
    d, f = config.width, config.mlp_width
    transition = 2 * d * f + f + d + (3 * d + 5 * f if config.transition == "conv" else 0)
    return (norms - 1) * 4 * d**2 + transition + norms * 2 * d


def stack_parameters(config, norms):
    d = config.width
    layers = config.layers_before + config.block_layers + config.layers_after
    table = config.steps * d if config.step_coordinates == "learned" else 0
    join = 3 * d**2 if config.join == "concat" else 0
    halt = d + 1 if config.halting != "none" else 0
    last_norm = 2 * d if config.order == "pre" else 0
    return layers * layer_parameters(config, norms) + table + join + halt + last_norm


@pytest.mark.parametrize("config", [UT_TINY, UT_SMALL, UT_BASE, UT_BIG, adaptive(UT_BASE)])
def test_number_of_parameters_of_the_published_sizes(config):
    """Of encoder, decoder and their one embedding; loops add none but their coordinates."""
    embedding = config.vocab_size * config.width
    total = embedding + stack_parameters(config, 2) + stack_parameters(config, 3)
    assert toy.parameters(config) == total


VARIANT = dataclasses.replace(
    SMALLEST,
    block_layers=2,
    layers_before=1,
    layers_after=2,
    transition="conv",
    join="concat",
    step_coordinates="sinusoid",
    order="post",
    tie_embeddings=False,
)


@pytest.mark.parametrize("config", [TINY, SMALLEST, ADAPTIVE, VARIANT])
def test_number_of_parameters_of_a_language_model(config):
    embeddings = (1 if config.tie_embeddings else 2) * config.vocab_size * config.width
    assert toy.parameters(config) == embeddings + stack_parameters(config, 2)


def test_adaptive_doubles_the_steps():
    assert (adaptive(UT_BASE).steps, adaptive(UT_BASE, steps=24).steps) == (12, 24)


def test_initialisation():
    model = toy.initialised(dataclasses.replace(TINY, steps=60))
    core = model.decoder.core
    for kernel, std in (
        (model.embedding.table, 192**-0.5),
        (model.decoder.coordinates.table, 192**-0.5),
        (core.attention.query.kernel, 192**-0.5),
        (core.transition.up.kernel, (2 / (192 + 768)) ** 0.5),
    ):
        assert np.std(kernel[...]) == pytest.approx(std, rel=0.03)
    assert float(model.decoder.halt.bias[...][0]) == 1


def test_flops_count_every_matrix():
    d, f = 16, 24
    layer = 4 * d**2 + 2 * d * f + d * 32
    want = 2 * (5 * layer + d * 13)
    assert SMALLEST.flops_per_token(32) == want
    assert SMALLEST.flops_per_token(32, training=True) == 3 * want
    more = dataclasses.replace(SMALLEST, transition="conv", join="concat", halting="position")
    extra = 5 * (3 * d + 5 * f) + 5 * 3 * d**2 + 5 * d
    assert more.flops_per_token(32) == want + 2 * extra


# Coordinates


def test_an_offset_shifts_all_positions():
    model = toy.drawn(SMALLEST)
    logits, _ = run(model, TOKENS, offset=np.full(2, 7, np.int32))
    want, _ = reference(model, TOKENS, offset=7)
    np.testing.assert_allclose(logits, want, atol=TOLERANCE * np.max(np.abs(want)))
    assert np.max(np.abs(logits - run(model, TOKENS)[0])) > 1e-2


def test_a_random_start_stays_in_the_context():
    model = toy.drawn(dataclasses.replace(SMALLEST, start="random"))
    starts = np.concatenate([model.start(jax.random.key(i), 64, 9) for i in range(4)])
    assert (starts.min(), starts.max()) == (0, 32 - 9)
    assert model.start(None, 2, 9) is None
    drawn, _ = jax.jit(lambda model, key: model.train_call(TOKENS, key=key))(
        model, jax.random.key(0)
    )
    assert np.max(np.abs(drawn - run(model, TOKENS)[0])) > 1e-3


# Halting


@pytest.mark.parametrize(
    "rule, transition",
    [
        ("interpolate", "conv"),
        ("interpolate", "mlp"),
        ("accumulate", "mlp"),
        ("copy-halted", "mlp"),
    ],
)
def test_both_forms_and_the_cache_equal_the_plain_loop(rule, transition):
    """Scan, while loop, and token by token behind a prompt: halted positions are read by later
    ones, in all loops, as if they had gone on."""
    model = halting_late(dataclasses.replace(ADAPTIVE, rule=rule, transition=transition))
    want, ponder = reference(model, TOKENS)
    assert len(np.unique(np.floor(ponder))) > 2, "positions should halt at different loops"
    call = jax.jit(
        lambda model, early: model(TOKENS, differentiable=not early)[0], static_argnums=1
    )
    state = model.init_state(2, capacity=9)
    parts, state = [], state
    for begin, end in [(0, 4), *((t, t + 1) for t in range(4, 9))]:
        new, state = run(model, TOKENS[:, begin:end], state)
        parts.append(new)
    for logits in (call(model, False), call(model, True), np.concatenate(parts, axis=1)):
        np.testing.assert_allclose(logits, want, atol=TOLERANCE * np.max(np.abs(want)))
    _, got = model.pondered(TOKENS)
    np.testing.assert_allclose(got.time, ponder, atol=1e-5)


def test_a_loop_ends_when_all_have_halted():
    """Loops that would run the layer do not: their coordinates may be anything."""
    model = halting_late(dataclasses.replace(ADAPTIVE, rule="copy-halted"), 1.0, 2)
    used = int(np.floor(reference(model, TOKENS)[1]).max())
    assert used < SMALLEST.steps
    graph, state = nnx.split(model)
    state = nnx.to_pure_dict(state)
    table = state["decoder"]["coordinates"]["table"]
    state["decoder"]["coordinates"]["table"] = table.at[used:].set(jnp.nan)
    broken = nnx.merge(graph, state)
    want, _ = run(model, TOKENS)
    logits, _ = broken(TOKENS, differentiable=False)
    np.testing.assert_allclose(logits, want, atol=TOLERANCE)
    assert np.isnan(broken(TOKENS)[0]).any()


def test_measures_are_means_over_tokens():
    model = halting_late(ADAPTIVE)
    ids = np.ones((2, 9), np.int32)
    ids[0, 5:] = 0
    found = model.measure(TOKENS, segment_ids=ids)
    reset = NO_RESET.copy()
    reset[0, 5] = True
    _, ponder = references.universal_transformer(numbers(model), TOKENS, reset, model.config)
    ponder = ponder[ids != 0]
    assert float(found["ponder_time"]) == pytest.approx(ponder.mean(), abs=1e-5)
    assert 1 < float(found["ponder_steps"]) < float(found["ponder_time"])
    assert toy.drawn(SMALLEST).measure(TOKENS) == {}


@jax.jit
def trained(model, tokens, key, **options):
    return model.train_call(tokens, key=key, **options)


def test_the_penalty_is_the_weighted_ponder_time():
    model = halting_late(dataclasses.replace(ADAPTIVE, ponder_weight=0.5))
    logits, penalty = trained(model, TOKENS, jax.random.key(0))
    np.testing.assert_allclose(penalty, 0.5 * reference(model, TOKENS)[1], atol=1e-5)
    np.testing.assert_allclose(logits, run(model, TOKENS)[0], atol=TOLERANCE)
    assert trained(toy.drawn(SMALLEST), TOKENS, jax.random.key(0))[1] is None


def test_dropout_is_of_training_only():
    model = toy.drawn(dataclasses.replace(SMALLEST, dropout=0.5))
    first, second = (trained(model, TOKENS, jax.random.key(i))[0] for i in range(2))
    assert np.max(np.abs(first - second)) > 1e-2
    np.testing.assert_array_equal(run(model, TOKENS)[0], run(toy.drawn(SMALLEST), TOKENS)[0])


# The encoder, and both


def padded(tokens):
    """Tokens with other ones behind them, and which are real."""
    wide = np.concatenate([tokens, tokens[:, :3]], axis=1)
    return wide, np.arange(wide.shape[1])[None] < np.full((len(tokens), 1), tokens.shape[1])


@pytest.mark.parametrize("transition", ["mlp", "conv"])
def test_padding_changes_nothing_for_an_encoder(transition):
    model = halting_late(dataclasses.replace(ENCODER, transition=transition), bias=0.0)
    call = jax.jit(lambda model, tokens, **options: model(tokens, **options))
    want, alone = call(model, TOKENS)
    wide, is_token = padded(TOKENS)
    logits, ponder = call(model, wide, is_token=is_token)
    np.testing.assert_allclose(logits[:, :9], want, atol=TOLERANCE)
    np.testing.assert_allclose(ponder.time[:, :9], alone.time, atol=1e-5)
    assert len(np.unique(alone.time)) == 2, "all positions of a row halt together"


def test_an_encoder_sees_what_follows():
    model = toy.drawn(ENCODER)
    other = TOKENS.copy()
    other[:, -1] = (other[:, -1] + 1) % 13
    assert np.all(np.any(model(TOKENS)[0][:, 0] != model(other)[0][:, 0], axis=-1))


def test_a_decoder_with_a_source_writes_token_by_token():
    model = halting_late(SEQ2SEQ)
    offset = np.array([0, 5], np.int32)
    whole, _ = run(model, TOKENS, source=SOURCE, offset=offset)
    wide, is_token = padded(SOURCE)
    again, _ = run(model, TOKENS, source=wide, source_is_token=is_token, offset=offset)
    np.testing.assert_allclose(again, whole, atol=TOLERANCE)
    state = model.read(SOURCE, capacity=9, offset=offset)
    parts = []
    for t in range(9):
        new, state = run(model, TOKENS[:, t : t + 1], state, offset=offset)
        parts.append(new)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=TOLERANCE)
    other = SOURCE.copy()
    other[0] = (other[0] + 1) % 13
    changed, _ = run(model, TOKENS, source=other, offset=offset)
    assert np.max(np.abs(changed[0] - whole[0])) > 1e-3
    np.testing.assert_array_equal(changed[1], whole[1])


def test_the_penalty_counts_the_source_without_its_padding():
    model = halting_late(SEQ2SEQ)
    wide, is_token = padded(SOURCE)
    options = {"source": wide, "source_is_token": is_token}
    of_source, own = model.pondered(TOKENS, **options)
    _, penalty = trained(model, TOKENS, jax.random.key(0), **options)
    want = 0.01 * (own.time + np.mean(of_source.time[:, :6], axis=1, keepdims=True))
    np.testing.assert_allclose(penalty, want, atol=1e-6)


def test_translation_gives_the_best_token_at_every_step():
    model = halting_late(SEQ2SEQ)
    written = translate(model, SOURCE, begin=1, end=12, max_new_tokens=5)
    assert written.shape == (2, 5) and STOPPED not in written, "these rows write no 12"
    tokens = np.concatenate([np.full((2, 1), 1), written[:, :-1]], axis=1).astype(np.int32)
    logits, _ = run(model, tokens, source=SOURCE)
    want = np.argmax(logits, axis=-1)
    np.testing.assert_array_equal(written, want)
    end = int(want[0, 2])
    written = translate(model, SOURCE, begin=1, end=end, max_new_tokens=5)
    first = int(np.argmax(want[0] == end))
    np.testing.assert_array_equal(written[0], [*want[0, :first], *[STOPPED] * (5 - first)])


def test_twenty_steps_lower_the_loss_of_an_encoder():
    model = toy.initialised(dataclasses.replace(ENCODER, halting="position"))
    values = toy.losses(model, toy.counting(13))
    assert np.mean(values[-3:]) < 0.8 * values[0]


# Bad input


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"heads": 3}, "width must be a multiple of heads, got 16 and 3"),
        ({"block_layers": 0}, "block_layers must be >= 1, got 0"),
        ({"rule": "mean"}, "rule must be one of interpolate, accumulate, copy-halted, got 'mean'"),
        ({"step_coordinates": "rotary"}, "step_coordinates must be one of learned, sinusoid"),
        ({"join": "multiply"}, "join must be one of add, concat, got 'multiply'"),
        ({"start": "one"}, "start must be one of zero, random, step, got 'one'"),
        ({"transition": "gru"}, "transition must be one of mlp, conv, got 'gru'"),
        ({"halting_epsilon": 0.0}, r"halting_epsilon must lie in \(0, 1\)"),
        ({"dropout": 1.0}, r".* dropout in \[0, 1\), got 0.01 and 1.0"),
    ],
)
def test_options_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=f"^UniversalTransformerConfig: {message}"):
        dataclasses.replace(SMALLEST, **change)


def test_only_a_decoder_alone_is_a_language_model():
    """So that `jaxrec train` refuses the others as it refuses whatever is none."""
    assert isinstance(TINY, LanguageModelConfig)
    assert not isinstance(UT_BASE, LanguageModelConfig)
    assert not isinstance(ENCODER, LanguageModelConfig)


def test_a_decoder_cannot_halt_by_row():
    config = dataclasses.replace(SMALLEST, halting="row")
    with pytest.raises(ValueError, match=r"which a decoder must not see\. Expected halting"):
        jax.eval_shape(lambda: toy.abstract(config))


def test_a_source_is_needed_once():
    decoder, both = toy.drawn(SMALLEST), toy.drawn(SEQ2SEQ)
    with pytest.raises(ValueError, match=r"with an encoder needs a source \(b s\)"):
        both(TOKENS)
    with pytest.raises(ValueError, match=r"reads a source. Take its state from\s+read\("):
        both.init_state(2, capacity=9)
    with pytest.raises(ValueError, match="the state holds a source already"):
        jax.eval_shape(lambda: both(TOKENS, both.read(SOURCE, capacity=9), source=SOURCE))
    for call in (lambda: decoder(TOKENS, source=SOURCE), lambda: decoder.read(SOURCE, capacity=9)):
        with pytest.raises(ValueError, match="without an encoder reads no source"):
            call()


def test_translation_refuses_what_it_cannot_write():
    model = toy.drawn(SEQ2SEQ)
    with pytest.raises(UserError, match="max_new_tokens must be >= 1, got 0"):
        translate(model, SOURCE, begin=1, end=2, max_new_tokens=0)
    with pytest.raises(UserError, match="tokens below 13, got 1 and 13"):
        translate(model, SOURCE, begin=1, end=13, max_new_tokens=3)
