"""Drafts that are checked: the text of full depth, whatever was drafted."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.generation import SamplingConfig, complete, generate_speculative
from jaxrec.generation.speculative import _advance
from tests.generation.test_autoregressive import CONFIGS
from tests.models import toy

MODEL = toy.drawn(dataclasses.replace(CONFIGS["huginn"], mean_depth=6))
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7, 8], [7, 7, 3, 9]]
GREEDY = SamplingConfig(temperature=0.0)
SAMPLED = SamplingConfig(temperature=0.7, top_k=8, repetition_penalty=1.3)
KEY, LATENT_KEY = jax.random.key(3), jax.random.key(4)
NEW = 9


def run(prompts=PROMPTS, **options):
    """The new tokens of each row, and the rounds."""
    options = {"draft_depth": 2, "lookahead": 3, "depth": 6, "config": GREEDY} | options
    options = {"max_new_tokens": NEW, "key": KEY, "latent_key": LATENT_KEY} | options
    rounds = list(generate_speculative(MODEL, prompts, **options))
    rows = zip(*(step.new_tokens for step in rounds), strict=True)
    return [[token for part in row for token in part] for row in rows], rounds


@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_text_is_that_of_full_depth(config):
    tokens, rounds = run(config=config)
    plain = complete(
        MODEL,
        PROMPTS,
        max_new_tokens=NEW,
        depth=6,
        config=config,
        key=KEY,
        latent_key=LATENT_KEY,
    )
    assert tokens == plain
    accepted = np.stack([step.accepted for step in rounds[1:]])
    assert len({*accepted[0].tolist()}) > 1, "the rows should accept different lengths"
    assert len(rounds) - 1 < NEW - 1, "drafts should save rounds"


def test_rows_do_not_talk():
    together, _ = run(latent_key=None)
    turned, _ = run(PROMPTS[1:] + PROMPTS[:1], latent_key=None)
    assert turned == together[1:] + together[:1]


def test_drafts_at_full_depth_are_all_accepted():
    """Each round then adds the lookahead and nothing else."""
    _, rounds = run(draft_depth=6)
    np.testing.assert_array_equal(rounds[-1].length - rounds[0].length, [9, 9, 9])
    assert all(np.all(step.accepted == 3) for step in rounds[1:])


def test_a_lower_threshold_accepts_more():
    exact, loose = run()[1], run(threshold=1e-3)[1]
    assert len(loose) < len(exact)
    assert all(np.all(step.accepted == 3) for step in loose[1:])


def test_rows_end_before_stop_tokens():
    tokens, _ = run()
    stop = tokens[1][4]
    stopped, _ = run(stop_tokens=[stop])
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in tokens]


def test_another_depth_or_key_compiles_nothing():
    before = _advance._cache_size()
    run(stop_tokens=[100, 101])
    assert _advance._cache_size() == before + 1
    before += 1
    run(stop_tokens=[100, 102], draft_depth=3, key=jax.random.key(9))
    assert _advance._cache_size() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_depth": 0}, "depth must be >= 1, got 0"),
        ({"depth": 0}, "depth must be >= 1, got 0"),
        ({"lookahead": 0}, "lookahead must be >= 1, got 0"),
        ({"threshold": 0.0}, r"must be in \(0, 1\], got 0"),
        ({"strategy": "ring"}, "Unknown cache strategy 'ring'"),
        ({"config": SamplingConfig(), "key": None}, "needs a key"),
        ({"prompts": [[1], [2] * 90]}, "prompt 1 with 90 tokens and 9 new ones is longer"),
    ],
)
def test_bad_input_is_refused_by_the_call(options, message):
    options = {"prompts": PROMPTS, "max_new_tokens": NEW, "config": GREEDY} | options
    with pytest.raises(UserError, match=message):
        generate_speculative(MODEL, **options)
