"""Cached, padded, batched generation against one full pass per token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.errors import UserError
from jaxrec.generation import STOPPED, SamplingConfig, complete, generate
from jaxrec.generation.autoregressive import _decode
from jaxrec.generation.sampling import Sampling, draw
from jaxrec.models.huginn import HuginnConfig
from jaxrec.models.linear_attention import LinearAttentionConfig
from jaxrec.models.linear_rnn import LinearRNNConfig
from jaxrec.models.mamba2 import Mamba2Config
from jaxrec.models.pararnn import ParaRNNLMConfig
from jaxrec.models.protocol import loop_inputs
from jaxrec.models.rwkv import RWKVConfig
from jaxrec.models.xlstm import XLSTMConfig
from tests.models import toy

VOCAB, CONTEXT = 40, 96
CONFIGS = {
    "huginn": HuginnConfig(
        vocab_size=VOCAB,
        width=16,
        heads=2,
        mlp_width=24,
        prelude_layers=1,
        core_layers=2,
        coda_layers=1,
        context=CONTEXT,
        mean_depth=3,
        backprop_depth=2,
    ),
    "linear_rnn": LinearRNNConfig(
        vocab_size=VOCAB,
        width=16,
        recurrent_width=16,
        heads=2,
        mlp_width=24,
        layers=2,
        context=CONTEXT,
    ),
}
# One layer of each further kind of state; packing and cutting them is tested with the models.
SIZES = {"vocab_size": VOCAB, "width": 8, "layers": 1}
DELTA = {"rule": "delta", "gate": "step", "conv_width": 3, "chunk": 4}
FURTHER = {
    "linear_attention": LinearAttentionConfig(
        **SIZES, heads=2, key_width=4, value_width=4, mlp_width=8, **DELTA
    ),
    "mamba2": Mamba2Config(**SIZES, heads=2, head_width=4, state_size=4),
    "pararnn": ParaRNNLMConfig(**SIZES, heads=2, mlp_width=8),
    "rwkv": RWKVConfig(**SIZES, inner_width=8, mlp_width=8),
    "xlstm": XLSTMConfig(**SIZES, heads=2, key_width=4, value_width=8, mlp_width=8),
}
PROMPTS = [[5], list(range(30)), [7, 7, 3, 9]]
# Between what an untrained model repeats without end and what it draws whatever its scores.
SHARP = SamplingConfig(temperature=0.8)
FILTERED = SamplingConfig(top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.3, temperature=0.7)
GREEDY = SamplingConfig(temperature=0.0)
KEY, LATENT_KEY = jax.random.key(3), jax.random.key(4)
NEW = 12

run = functools.partial(complete, max_new_tokens=NEW, key=KEY, latent_key=LATENT_KEY, config=SHARP)


@functools.cache
def build(name):
    return jax.jit(lambda: CONFIGS[name].build(rngs=nnx.Rngs(0)))()


@pytest.fixture(params=CONFIGS)
def model(request):
    return build(request.param)


@pytest.fixture
def looped():
    return build("huginn")


@jax.jit
def full_pass(model, tokens, depth, latent):
    inputs = loop_inputs(model.config, depth, None)
    return model(tokens, **(inputs | {"latent": latent} if inputs else {}))[0]


def reference(model, prompt, row, config, depth=3, latent_key=LATENT_KEY):
    """One row, with all its tokens through the model anew for every token."""
    tokens, width = list(prompt), 16
    row_key = jax.random.fold_in(KEY, row)
    latent = np.zeros((1, CONTEXT, width), np.float32)
    if model.config.mean_depth is not None and latent_key is not None:
        for position in range(len(prompt) + NEW):
            key = jax.random.fold_in(jax.random.fold_in(latent_key, row), position)
            latent[:, position] = model.init_latent(key, 1, 1)[:, 0]
    for step in range(NEW):
        padded = np.zeros((1, CONTEXT), np.int32)  # what comes later is not seen
        padded[0, : len(tokens)] = tokens
        logits = full_pass(model, padded, jnp.int32(depth), latent)[:, len(tokens) - 1]
        present = np.isin(np.arange(VOCAB), tokens)[None]
        key = jax.random.fold_in(row_key, step)
        tokens.append(int(draw(logits, Sampling.of(config), key[None], present)[0]))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("config", [SHARP, FILTERED])
def test_cached_and_batched_equals_one_full_pass_per_token(model, config):
    rows = run(model, PROMPTS, config=config)
    assert rows == [reference(model, prompt, row, config) for row, prompt in enumerate(PROMPTS)]


def test_greedy_from_a_zero_latent_state_needs_no_key(model):
    rows = run(model, PROMPTS, config=GREEDY, key=None, latent_key=None)
    assert rows == [
        reference(model, prompt, row, GREEDY, latent_key=None) for row, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("config", FURTHER.values(), ids=FURTHER)
def test_every_kind_of_state_writes_what_the_full_pass_scores_best(config):
    model = toy.drawn(config)
    prompts = [[5], [3, 1, 4, 1, 5, 9], [7, 7, 3]]
    rows = complete(model, prompts, max_new_tokens=4, config=GREEDY)
    padded = np.zeros((3, 9), np.int32)  # what comes later is not seen
    for row, prompt, new in zip(padded, prompts, rows, strict=True):
        row[: len(prompt) + 3] = prompt + new[:-1]
    best = np.argmax(toy.run(model, padded)[0], axis=-1)
    for row, prompt, new in zip(best, prompts, rows, strict=True):
        assert row[len(prompt) - 1 :][:4].tolist() == new


def test_depth_is_the_number_of_loops(looped):
    rows = run(looped, PROMPTS[:1], depth=5)
    assert rows == [reference(looped, PROMPTS[0], 0, SHARP, depth=5)]
    assert rows != run(looped, PROMPTS[:1])


def test_rows_do_not_talk(model):
    # The neighbours change, and one is so long that all are padded further.
    others = [list(range(VOCAB)) * 2, [1]]
    rows = run(model, [PROMPTS[0], *others])
    assert rows[0] == run(model, PROMPTS)[0] == run(model, PROMPTS[:1])[0]


def test_the_same_seed_gives_the_same_text_and_another_another(model):
    assert run(model, PROMPTS) == run(model, PROMPTS) != run(model, PROMPTS, key=LATENT_KEY)
    first, _, third = run(model, [[5], [6], [5]], config=SamplingConfig(temperature=2.0))
    assert first != third  # equal prompts in one batch are different draws


def test_tokens_come_one_step_at_a_time(model):
    steps = generate(
        model, PROMPTS, max_new_tokens=NEW, config=SHARP, key=KEY, latent_key=LATENT_KEY
    )
    first = next(steps)
    assert first.shape == (3,) and first.dtype == np.int32
    assert len(list(steps)) == NEW - 1


def test_rows_stop_one_by_one(model):
    free = run(model, PROMPTS)
    stop = [free[0][2], free[1][5]]
    expected = [row[: min((row.index(s) for s in stop if s in row), default=NEW)] for row in free]
    assert run(model, PROMPTS, stop_tokens=stop) == expected
    steps = list(
        generate(model, PROMPTS[:1], max_new_tokens=NEW, config=SHARP, key=KEY,
                 latent_key=LATENT_KEY, stop_tokens=stop)
    )  # fmt: skip
    assert len(steps) == len(expected[0]) + 1
    assert steps[-1].tolist() == [STOPPED]


def test_all_rows_may_stop_at_once(looped):
    assert run(looped, [[5]], stop_tokens=range(VOCAB)) == [[]]


def test_another_value_seed_or_model_compiles_nothing(looped):
    run(looped, PROMPTS, config=FILTERED)
    compiled = _decode._cache_size()
    other = dataclasses.replace(FILTERED, temperature=2.0, top_k=3, top_p=0.5, min_p=0.2)
    run(looped, PROMPTS, config=other, key=LATENT_KEY)
    run(looped, [[9], [8, 8], [4]], config=dataclasses.replace(other, repetition_penalty=1.5))
    run(jax.tree.map(jnp.copy, looped), PROMPTS, config=other, max_new_tokens=NEW - 1)
    assert _decode._cache_size() == compiled


def test_the_context_can_be_filled_to_its_end(model):
    rows = run(model, [[1] * (CONTEXT - NEW), [2], [3]])
    assert [len(row) for row in rows] == [NEW] * 3


BAD = [
    ({"prompts": []}, r"there is no prompt\. Give at least one"),
    ({"prompts": [[]]}, r"the prompt has no tokens\. Give some text, or begin with"),
    ({"prompts": [[1], []]}, r"prompt 1 has no tokens"),
    ({"prompts": [[1, VOCAB]]}, r"has the token 40, but the model knows 0 to 39"),
    ({"prompts": [[-1]]}, r"has the token -1, but the model knows 0 to 39"),
    (
        {"prompts": [[1] * 97]},
        r"the prompt has 97 tokens and is longer than the context: the model's is 96 tokens,"
        r" prompt and continuation together\. Shorten it to at most 95\.",
    ),
    (
        {"prompts": [[1], [1] * 90]},
        r"prompt 1 with 90 tokens and 12 new ones is longer than the context of 96 tokens\."
        r" Ask for at most 6 new tokens, or shorten the prompt\.",
    ),
    ({"max_new_tokens": 0}, r"max_new_tokens must be >= 1, got 0"),
    ({"depth": 0}, r"depth must be >= 1, got 0\. The model's own is 3"),
    ({"key": None}, r"drawing at temperature 1 needs a key\. Pass key=jax\.random\.key\(seed\)"),
]


@pytest.mark.parametrize("arguments, message", BAD)
def test_bad_input_is_refused_by_the_call(arguments, message, looped):
    arguments = {"prompts": [[1]], "max_new_tokens": NEW, "key": KEY} | arguments
    with pytest.raises(UserError, match=message):
        generate(looped, **arguments)


def test_depth_without_a_loop_is_refused():
    with pytest.raises(UserError, match="depth is 2, but RecurrentLM has no loop"):
        generate(build("linear_rnn"), [[1]], max_new_tokens=NEW, key=KEY, depth=2)


def test_a_prompt_read_twice_is_the_prompt_after_itself():
    model, options = build("linear_rnn"), {"max_new_tokens": NEW, "key": KEY}
    twice = complete(model, [[1, 2, 3], [4]], read_twice=True, **options)
    assert twice == complete(model, [[1, 2, 3, 1, 2, 3], [4, 4]], **options)
    assert twice != complete(model, [[1, 2, 3], [4]], **options)
