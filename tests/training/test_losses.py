"""Cross-entropy over the labels that count."""

import jax.numpy as jnp
import numpy as np

from jaxrec.training.data.batches import IGNORED
from jaxrec.training.losses import cross_entropy, token_losses

LOGITS = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
LABELS = np.array([[4, IGNORED, 0], [IGNORED, IGNORED, 2]], np.int32)


def test_token_losses_are_negative_log_probabilities():
    losses, counts = token_losses(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    probabilities = np.exp(LOGITS.astype(np.float64))
    probabilities /= probabilities.sum(-1, keepdims=True)
    for index in np.ndindex(LABELS.shape):
        label = LABELS[index]
        assert counts[index] == (label != IGNORED)
        want = -np.log(probabilities[index][label]) if label != IGNORED else 0
        np.testing.assert_allclose(losses[index], want, rtol=1e-6)


def test_the_mean_is_over_labels_that_count():
    losses, _ = token_losses(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    got = cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    np.testing.assert_allclose(got, np.sum(losses) / 3, rtol=1e-6)


def test_a_penalty_is_paid_where_labels_count():
    penalty = np.arange(6, dtype=np.float32).reshape(2, 3)
    plain = cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    got = cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS), jnp.asarray(penalty))
    np.testing.assert_allclose(got, plain + (0 + 2 + 5) / 3, rtol=1e-6)


def test_without_a_label_it_is_zero():
    assert cross_entropy(jnp.asarray(LOGITS), jnp.full((2, 3), IGNORED, jnp.int32)) == 0
