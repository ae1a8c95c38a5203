"""Depth found token by token, in batches as alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.errors import UserError
from jaxrec.generation import (
    STOPPED,
    Exit,
    LatentNoise,
    SamplingConfig,
    complete,
    generate_adaptive,
)
from jaxrec.models.linear_rnn import LinearRNNConfig
from jaxrec.ops import attention
from tests.generation.test_autoregressive import CONFIGS
from tests.models import toy

MODEL = toy.drawn(dataclasses.replace(CONFIGS["huginn"], mean_depth=6))
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7, 8], [7, 7, 3, 9]]
GREEDY = SamplingConfig(temperature=0.0)
KEY, LATENT_KEY = jax.random.key(3), jax.random.key(4)
CHANGE = Exit(criterion="latent-diff", threshold=0.25)


def run(prompts=PROMPTS, **options):
    """Tokens (b n), loops (b n) of each row."""
    options = {"max_new_tokens": 4, "config": GREEDY, "latent_key": LATENT_KEY} | options
    steps = list(generate_adaptive(MODEL, prompts, **options))
    return np.stack([s.tokens for s in steps], 1), np.stack([s.loops for s in steps], 1)


@pytest.mark.parametrize(
    "options",
    [
        {"exit": CHANGE},
        {"exit": CHANGE, "strategy": "latest-compress-s2", "continuous": True},
        {"exit": Exit(criterion="kl", threshold=5e-3, every=2), "strategy": "always-last"},
    ],
    ids=["latent-diff", "ring", "kl"],
)
def test_rows_of_a_batch_stop_each_by_itself(options):
    """Keys and values of a row's neighbours that run longer must not be stored for it."""
    tokens, loops = run(**options, latent_key=None)
    assert np.any(loops[0] != loops[1]), "the rows should differ"
    for row, prompt in enumerate(PROMPTS):
        alone = run([prompt, prompt, prompt], **options, latent_key=None)
        np.testing.assert_array_equal(alone[0], np.stack([tokens[row]] * 3))
        np.testing.assert_array_equal(alone[1], np.stack([loops[row]] * 3))


def test_without_an_exit_it_is_plain_generation():
    tokens, loops = run(depth=3, strategy="full")
    plain = complete(
        MODEL, PROMPTS, max_new_tokens=4, config=GREEDY, depth=3, latent_key=LATENT_KEY
    )
    assert tokens.tolist() == plain and np.all(loops == 3)
    sampling = SamplingConfig(temperature=0.8, repetition_penalty=1.2)
    tokens, _ = run(depth=3, strategy="full", config=sampling, key=KEY)
    plain = complete(
        MODEL,
        PROMPTS,
        max_new_tokens=4,
        config=sampling,
        depth=3,
        key=KEY,
        latent_key=LATENT_KEY,
    )
    assert tokens.tolist() == plain


def test_a_schedule_says_the_depth_of_each_token():
    _, loops = run(schedule=[5, 1, 2])
    assert loops.tolist() == [[5, 1, 2, 2]] * 3


def test_the_first_check_may_come_late():
    _, loops = run(exit=dataclasses.replace(CHANGE, threshold=100.0, min_loops=3))
    assert np.all(loops == 3)


def test_the_prompt_may_have_its_full_depth():
    _, loops = run(exit=dataclasses.replace(CHANGE, threshold=100.0, in_prompt=False))
    assert loops.tolist() == [[6, 1, 1, 1]] * 3


@pytest.mark.parametrize(
    "options",
    [{"exit": dataclasses.replace(CHANGE, threshold=100.0, min_loops=2)}, {"schedule": [2]}],
    ids=["exit", "schedule"],
)
def test_a_continuous_loop_goes_on_from_the_raw_state(options):
    """Against whole passes without a cache, in which each token begins where the one before has
    ended: at s, not at norm(s)."""
    prompt, new, depth = PROMPTS[1], 4, 2
    room = len(prompt) + new
    view, _ = attention.open_view(None, (1, room))

    @jax.jit
    def whole_pass(tokens, first):
        embedded, _ = MODEL.embed(tokens, view)
        last, _, _ = MODEL.refine(first, embedded, depth, view)
        change = jnp.linalg.norm(last - first, axis=-1) / jnp.linalg.norm(last, axis=-1)
        return MODEL.predict(last, view)[0], last, change

    tokens = np.zeros((1, room), np.int32)
    tokens[0, : len(prompt)] = prompt
    first, changes = np.zeros((1, room, MODEL.config.width), np.float32), []
    for end in range(len(prompt), room):
        logits, last, change = whole_pass(tokens, first)
        tokens[0, end] = np.argmax(logits[0, end - 1])
        first[0, end] = last[0, end - 1]
        changes.append(np.mean(change[0, 0 if end == len(prompt) else end - 1 : end]))

    steps = list(
        generate_adaptive(
            MODEL,
            [prompt],
            max_new_tokens=new,
            depth=depth,
            strategy="full",
            continuous=True,
            config=GREEDY,
            **options,
        )
    )
    assert [int(step.tokens[0]) for step in steps] == tokens[0, len(prompt) :].tolist()
    if "exit" in options:  # looks back to where the loop began; ten times the gap, 8.4e-8
        np.testing.assert_allclose([step.values[0, 1] for step in steps], changes, rtol=1e-6)


def test_noise_changes_the_text_and_its_key_repeats_it():
    noise = LatentNoise(3.0, "geom")
    once, again = (run(noise=noise, key=KEY)[0] for _ in range(2))
    np.testing.assert_array_equal(once, again)
    others = [PROMPTS[0], [8], [2, 2]]
    np.testing.assert_array_equal(run(others, noise=noise, key=KEY)[0][0], once[0])
    assert np.any(once != run()[0])


def test_rows_end_at_stop_tokens_and_count_nothing_then():
    tokens, _ = run(max_new_tokens=6)
    stop = int(tokens[0, 1])
    stopped, loops = run(max_new_tokens=6, stop_tokens=[stop])
    first = [int(np.argmax(row == stop)) if stop in row else 6 for row in tokens]
    for row, end in enumerate(first):
        np.testing.assert_array_equal(stopped[row, :end], tokens[row, :end])
        assert np.all(stopped[row, end:] == STOPPED)
        assert np.all(loops[row, end + 1 :] == 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth must be >= 1, got 0"),
        ({"schedule": [3, 0]}, "depth must be >= 1, got 0"),
        ({"schedule": []}, "schedule of depths is empty"),
        ({"strategy": "newest"}, "Unknown cache strategy 'newest'"),
        ({"config": SamplingConfig()}, "needs a key"),
        ({"max_new_tokens": 95}, "longer than the context of 96 tokens"),
        ({"prompts": [[1], [2] * 96]}, "prompt 1 has 96 tokens and is longer than the context"),
    ],
)
def test_bad_input_is_refused_by_the_call(options, message):
    with pytest.raises(UserError, match=message):
        generate_adaptive(
            **{"model": MODEL, "prompts": PROMPTS, "max_new_tokens": 2, "config": GREEDY} | options
        )


def test_a_model_without_a_loop_is_refused():
    config = LinearRNNConfig(
        vocab_size=9, width=8, recurrent_width=8, heads=2, mlp_width=8, layers=1, context=9
    )
    plain = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match="has no"):
        generate_adaptive(plain, [[1]], max_new_tokens=1, config=GREEDY)
