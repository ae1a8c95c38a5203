import jax
import numpy as np
import pytest

from jaxrec.generation import SamplingConfig
from jaxrec.generation.sampling import Sampling, draw

BAD = [
    ({"temperature": -1.0}, r"temperature must be >= 0 and finite, got -1.0. 0 takes the most"),
    ({"temperature": float("nan")}, r"temperature must be >= 0 and finite, got nan"),
    ({"top_k": 0}, r"top_k must be >= 1, got 0. Leave it out"),
    ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
    ({"repetition_penalty": 0.0}, r"repetition_penalty must be > 0 and finite, got 0.0"),
]


@pytest.mark.parametrize("fields, message", BAD)
def test_a_value_out_of_range_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**fields)


def test_what_would_change_nothing_is_left_out():
    sampling = Sampling.of(SamplingConfig(top_p=1.0, min_p=0.0))
    assert sampling[1:] == (None, None, None, None)
    assert Sampling.of(SamplingConfig(temperature=0.0, top_k=3)) == (None,) * 5


def frequencies(config, logits, draws=20000):
    keys = jax.random.split(jax.random.key(0), draws)
    rows = np.broadcast_to(np.asarray(logits, np.float32), (draws, len(logits)))
    tokens = jax.jit(draw)(rows, Sampling.of(config), keys)
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / draws


def test_tokens_come_as_often_as_they_are_probable():
    logits = np.log([0.1, 0.2, 0.3, 0.4])
    # Four standard deviations of a frequency of one half in 20000 draws: 0.014.
    np.testing.assert_allclose(
        frequencies(SamplingConfig(), logits), [0.1, 0.2, 0.3, 0.4], atol=0.014
    )
    sharp = np.array([1, 4, 9, 16]) / 30
    np.testing.assert_allclose(
        frequencies(SamplingConfig(temperature=0.5), logits), sharp, atol=0.014
    )
    np.testing.assert_allclose(
        frequencies(SamplingConfig(top_k=2), logits), [0, 0, 3 / 7, 4 / 7], atol=0.014
    )


def test_greedy_takes_the_first_of_the_best_and_needs_no_key():
    token = draw(
        np.array([[1, 3, 3]], np.float32), Sampling.of(SamplingConfig(temperature=0.0)), None
    )
    assert token.tolist() == [1]
