"""Filters against loops that say what each keeps."""

import jax
import numpy as np
import pytest

from jaxrec.generation import filters

VOCAB = 11


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def by_probability(row):
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


def naive_top_k(row, k):
    return set(by_probability(row)[:k])


def naive_top_p(row, p):
    probability, kept, mass = softmax(row), set(), 0.0
    for i in by_probability(row):
        if mass >= p:
            break
        kept.add(i)
        mass += probability[i]
    return kept


def naive_min_p(row, p):
    probability = softmax(row)
    return {i for i in range(len(row)) if probability[i] >= p * probability.max()}


CASES = [
    *[(filters.top_k, naive_top_k, k) for k in (1, 3, VOCAB, VOCAB + 5)],
    *[(filters.top_p, naive_top_p, p) for p in (1e-6, 0.1, 0.5, 0.9, 0.999)],
    *[(filters.min_p, naive_min_p, p) for p in (0.01, 0.3, 1.0)],
]


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(6, VOCAB)) * np.array([0.1, 1, 1, 3, 10, 30])[:, None]
    rows[2] = np.round(rows[2])  # ties
    return rows.astype(np.float32)


@pytest.mark.parametrize("function, naive, value", CASES)
def test_a_filter_keeps_what_its_loop_keeps(function, naive, value, logits):
    out = np.asarray(jax.jit(function)(logits, value))
    for row, filtered in zip(logits, out, strict=True):
        kept = naive(row, value)
        assert {i for i in range(VOCAB) if np.isfinite(filtered[i])} == kept
        assert all(filtered[i] == row[i] for i in kept)


@pytest.mark.parametrize("function, value", [(filters.top_k, 2), (filters.top_p, 0.4)])
def test_of_equal_tokens_the_first_are_kept(function, value):
    out = np.asarray(function(np.zeros((1, 5), np.float32), value))
    np.testing.assert_array_equal(np.isfinite(out[0]), [True, True, False, False, False])


def test_filters_follow_one_another(logits):
    once = filters.top_k(logits, 4)
    out = np.asarray(filters.min_p(filters.top_p(once, 0.9), 0.2))
    for row, filtered in zip(np.asarray(once), out, strict=True):
        kept = naive_top_k(row, 4) & naive_top_p(row, 0.9)
        kept &= naive_min_p(np.where(np.isin(range(VOCAB), list(kept)), row, -np.inf), 0.2)
        assert {i for i in range(VOCAB) if np.isfinite(filtered[i])} == kept


def test_temperature_divides():
    np.testing.assert_array_equal(
        filters.temperature(np.array([[1, -4]], np.float32), 0.5), [[2, -8]]
    )


def test_the_repetition_penalty_lowers_what_is_present():
    logits = np.array([[2, -2, 2, -2, 0]], np.float32)
    present = np.array([[True, True, False, False, True]])
    out = filters.repetition_penalty(logits, present, 4.0)
    np.testing.assert_array_equal(out, [[0.5, -8, 2, -2, 0]])
