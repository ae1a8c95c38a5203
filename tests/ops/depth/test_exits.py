"""Exit criteria against plain NumPy, and what they refuse."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.depth.exits import THRESHOLDS, Exit
from jaxrec.ops.depth.noise import LatentNoise

VOCAB = 7
rng = np.random.default_rng(0)
OLD, NEW = rng.normal(size=(2, 2, 3, 5)).astype(np.float32)
IS_TOKEN = np.array([[True, True, True], [False, True, True]])
LOGITS = 2 * rng.normal(size=(3, 2, VOCAB)).astype(np.float32)


def softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def entropy(p):
    return -np.sum(p * np.log(p + 1e-10), axis=-1)


def kl(old, new):
    return np.sum(old * np.log(old / new), axis=-1)


def levelled(p):
    p = np.where(p < 0.1 * p.max(-1, keepdims=True), 1 / VOCAB, p)
    return p / p.sum(-1, keepdims=True)


def test_latent_criteria_are_means_over_the_tokens_of_a_row():
    change = np.linalg.norm(NEW - OLD, axis=-1) / np.linalg.norm(NEW, axis=-1)
    cosine = np.sum(NEW * OLD, -1) / np.linalg.norm(NEW, axis=-1) / np.linalg.norm(OLD, axis=-1)
    for criterion, each in (("latent-diff", change), ("cosine", 1 - cosine)):
        got = Exit(criterion=criterion).of_latents(NEW, OLD, jnp.asarray(IS_TOKEN))
        expected = [each[0].mean(), each[1, 1:].mean()]
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_zero_latent_has_no_direction_and_ends_nothing():
    exit = Exit(criterion="cosine", threshold=10.0)
    value = exit.of_latents(jnp.asarray(NEW), jnp.zeros_like(NEW), jnp.asarray(IS_TOKEN))
    assert np.isnan(value).all() and not exit.holds(value).any()


def test_output_criteria_compare_with_the_check_before():
    uniform = np.full((2, VOCAB), 1 / VOCAB)
    p = softmax(LOGITS)
    expected = {
        "entropy-diff": np.abs(np.diff([np.full(2, 100.0), *entropy(p)], axis=0)),
        "kl": [kl(old, new) for old, new in zip([uniform, *p], p, strict=False)],
        "minp-kl": [
            kl(old, new) for old, new in zip([uniform, *levelled(p)], levelled(p), strict=False)
        ],
    }
    for criterion, values in expected.items():
        exit = Exit(criterion=criterion)
        memory = exit.begin(jnp.asarray(NEW), VOCAB)
        for logits, value in zip(LOGITS, values, strict=True):
            got, memory = exit.of_logits(jnp.asarray(logits), memory)
            np.testing.assert_allclose(got, value, rtol=2e-5, atol=1e-6, err_msg=criterion)


def test_the_argmax_is_stable_after_so_many_checks_in_a_row():
    best = [[3, 1], [3, 2], [3, 2], [0, 2]]
    exit = Exit(criterion="argmax-stability", threshold=2)
    memory = exit.begin(jnp.asarray(NEW), VOCAB)
    counts, ended = [], []
    for row in best:
        value, memory = exit.of_logits(jnp.asarray(np.eye(VOCAB, dtype=np.float32)[row]), memory)
        counts.append(value.tolist())
        ended.append(exit.holds(value).tolist())
    assert counts == [[0, 0], [1, 0], [2, 1], [0, 2]]
    assert ended == [[False, False], [False, False], [True, False], [False, True]]


def test_when_a_criterion_is_looked_at():
    exit = Exit(criterion="kl", min_loops=3, every=2)
    looked = [bool(exit.is_checked(jnp.asarray(loops, jnp.int32))) for loops in range(1, 8)]
    assert looked == [False, False, True, False, True, False, True]


@pytest.mark.parametrize("criterion", THRESHOLDS)
def test_a_threshold_of_the_wrong_sign_is_refused(criterion):
    for threshold in (-0.1, 0.0, float("inf")):
        with pytest.raises(ValueError, match=f"exit threshold of {criterion} must be > 0"):
            Exit(criterion=criterion, threshold=threshold)
    assert Exit(criterion=criterion).limit == THRESHOLDS[criterion]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exit(criterion="mood"), "must be one of latent-diff, cosine"),
        (lambda: Exit(criterion="kl", min_loops=0), "min_loops must be >= 1, got 0"),
        (lambda: Exit(criterion="kl", every=0), "every must be >= 1, got 0"),
        (lambda: LatentNoise(-1.0), "level must be > 0"),
        (lambda: LatentNoise(1.0, "pink"), "Noise must be one of"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
