"""The wavefront: settled text, rows of a batch, windows, draws; its steps are in golden cases."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.generation import DiffusionForcing, SamplingConfig, Tape, complete, generate_diffusion
from jaxrec.generation.diffusion_forcing.sampler import _advance
from tests.generation.test_autoregressive import CONFIGS
from tests.models import toy

MODEL = toy.drawn(dataclasses.replace(CONFIGS["huginn"], mean_depth=6))
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7, 8], [7, 7, 3, 9]]
GREEDY = SamplingConfig(temperature=0.0)
SAMPLED = SamplingConfig(temperature=0.7, top_k=8, repetition_penalty=1.3)
KEY, LATENT_KEY = jax.random.key(3), jax.random.key(4)
NEW = 7
FAST = DiffusionForcing(threshold=0.3, max_wavefront=8, inner_loops=2)
SETTLED = DiffusionForcing(threshold=1e-4, max_wavefront=8, inner_loops=8, embedding_ema=0.0)


def run(prompts=PROMPTS, **options):
    """The new tokens of each row, and the steps."""
    options = {"options": FAST, "config": GREEDY, "key": KEY, "latent_key": LATENT_KEY} | options
    options = {"max_new_tokens": NEW} | options
    steps = list(generate_diffusion(MODEL, prompts, **options))
    rows = zip(*(step.new_tokens for step in steps), strict=True)
    return [[token for part in row for token in part] for row in rows], steps


@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_settled_text_is_that_of_one_token_after_the_other(config):
    """With a small threshold every position is where its own loop would end."""
    tokens, steps = run(options=SETTLED, depth=48, config=config)
    plain = complete(
        MODEL,
        PROMPTS,
        max_new_tokens=NEW,
        depth=48,
        config=config,
        key=KEY,
        latent_key=LATENT_KEY,
    )
    assert tokens == plain
    assert np.all(np.diff([step.frozen for step in steps], axis=0) >= 0)


@pytest.mark.parametrize(
    "options",
    [
        FAST,
        *(
            pytest.param(dataclasses.replace(FAST, **changes), marks=pytest.mark.slow)
            for changes in (
                {"freeze": "latent-acceleration-2", "noise": 0.3, "headway": 2},
                {"freeze": "fixed", "full_prefill": False, "sqrt_mixer": True, "noise": 0.1},
                {"freeze": "token-stability", "continuous": True, "max_wavefront": 0},
            )
        ),
    ],
    ids=lambda options: options.freeze,
)
def test_rows_do_not_talk(options):
    """Row 0 keeps its text when its neighbours change, with all its draws; and rows that begin at
    zero change places with their prompts."""
    together, _ = run(options=options)
    assert all(len(row) == NEW for row in together)
    assert run([PROMPTS[0], [9] * 8, [30, 2]], options=options)[0][0] == together[0]
    quiet = dataclasses.replace(options, noise=0.0, headway=1)
    together, steps = run(options=quiet, latent_key=None)
    turned, turned_steps = run(PROMPTS[1:] + PROMPTS[:1], options=quiet, latent_key=None)
    assert turned == together[1:] + together[:1]
    for count in ("steps", "core_passes", "position_passes", "cache_clears", "frozen"):
        turned = np.roll(getattr(turned_steps[-1], count), 1)
        np.testing.assert_array_equal(turned, getattr(steps[-1], count))


def test_fewer_passes_of_the_core_than_tokens_times_depth():
    _, steps = run(options=dataclasses.replace(FAST, threshold=1.0), depth=12)
    assert np.all(steps[-1].core_passes - 1 < 12 * NEW / 2)


def test_the_stride_changes_nothing_but_when_tokens_are_shown():
    tokens, steps = run()
    strided, fewer = run(stride=5)
    assert strided == tokens
    assert len(fewer) - 1 == -(-(len(steps) - 1) // 5)
    np.testing.assert_array_equal(fewer[-1].core_passes, steps[-1].core_passes)


def test_a_narrow_window_makes_standing_waves_and_still_ends():
    narrow = dataclasses.replace(FAST, max_wavefront=2, threshold=0.05)
    tokens, steps = run(options=narrow)
    assert all(len(row) == NEW for row in tokens)
    assert np.all(steps[-1].standing_waves > 0)
    assert max(np.max(step.length - step.start) for step in steps) <= 3
    fixed = dataclasses.replace(narrow, freeze="fixed")
    assert all(len(row) == NEW for row in run(options=fixed)[0])


def test_a_prompt_stays_what_it_is():
    """Where the prompt begins the window, positions settle in it before it has ended."""
    eager = dataclasses.replace(FAST, full_prefill=False, threshold=1.5)
    _, steps = run(options=eager)
    for step in steps:
        for row, prompt in enumerate(PROMPTS):
            assert step.tokens[row, : len(prompt)].tolist() == prompt


def test_rows_end_before_stop_tokens():
    tokens, _ = run()
    stop = tokens[1][3]
    stopped, _ = run(stop_tokens=[stop])
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in tokens]


def test_a_step_limit_ends_what_never_settles():
    never = dataclasses.replace(FAST, threshold=1e-12, max_steps=3)
    _, steps = run(options=never)
    assert np.all(steps[-1].steps == 4) and np.all(steps[-1].is_done)


def test_the_end_of_the_context_ends_a_row():
    """More may be asked for than fits; what there is room for is the same."""
    context = MODEL.config.context
    prompt = [1 + i % 29 for i in range(context - 6)]
    tokens, steps = run([prompt], max_new_tokens=50)
    assert [step.length[0] > context for step in steps] == [False] * (len(steps) - 1) + [True]
    assert steps[-1].is_done[0] and 0 < len(tokens[0]) <= 6
    fitting, _ = run([prompt], max_new_tokens=6)
    assert fitting[0] == tokens[0]


def test_another_key_or_length_compiles_nothing():
    before = _advance._cache_size()
    run(max_new_tokens=NEW, stop_tokens=[100, 101])
    assert _advance._cache_size() == before + 1
    before += 1
    run(
        stop_tokens=[100, 102],
        key=jax.random.key(9),
        latent_key=jax.random.key(8),
        max_new_tokens=NEW - 1,
    )
    assert _advance._cache_size() == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"freeze": "soon"}, "freeze must be one of latent-diff"),
        ({"threshold": -0.03}, "freeze threshold must be > 0"),
        ({"inner_loops": 0}, "inner_loops must be >= 1, got 0"),
        ({"headway": 0}, "headway must be >= 1, got 0"),
        ({"max_wavefront": -1}, "max_wavefront must be >= 0, got -1"),
        ({"max_wavefront": 2, "headway": 3}, "2 positions cannot hold the 3 new ones"),
        ({"embedding_ema": 1.0}, r"embedding_ema must be in \[0, 1\), got 1"),
        ({"noise": 1.5}, r"noise must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DiffusionForcing(**fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth must be >= 1, got 0"),
        (
            {"options": dataclasses.replace(FAST, full_prefill=False, max_wavefront=4)},
            "a prompt of 8 tokens is larger than the window of 4 positions",
        ),
        ({"options": dataclasses.replace(FAST, strategy="newest")}, "Unknown cache strategy"),
        ({"config": SamplingConfig(), "key": None}, "needs a key"),
        ({"tape": Tape([], [])}, "a tape is that of one row, got 3 prompts"),
        ({"prompts": [[1], [2] * 96]}, "prompt 1 has 96 tokens and is longer than the context"),
    ],
)
def test_bad_input_is_refused_by_the_call(options, message):
    with pytest.raises(UserError, match=message):
        run(**options)
