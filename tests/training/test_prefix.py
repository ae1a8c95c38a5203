"""A model with a prefix is trained on the joint loss and scored behind its prefix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.cli.main import main
from jaxrec.models import prefix_linear
from jaxrec.training.config import TrainConfig
from jaxrec.training.data.batches import IGNORED
from jaxrec.training.metrics import read
from jaxrec.training.sharding import build_mesh
from jaxrec.training.step import build_steps
from tests.training.small import model_options, write_text

CONFIG = dataclasses.replace(
    prefix_linear.TINY,
    width=16,
    mixers=("conv", "linear", "attention"),
    heads=2,
    mlp_width=24,
    feature_width=3,
    mask_share=0.4,
)
BATCH, TIME, PREFIX = 3, 16, 8
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def steps():
    return build_steps(CONFIG, TrainConfig(batch=BATCH, time=TIME), build_mesh("data=1"))


def made():
    """The second row has a document that ends in the prefix, the third one that ends after it; some
    labels do not count.
    """
    tokens = np.random.default_rng(0).integers(0, 256, (BATCH, TIME + 1))
    segments = np.zeros((BATCH, TIME), np.int32)
    segments[1, 5:], segments[2, 11:] = 1, 1
    labels = tokens[:, 1:].copy()
    labels[0, 12], labels[1, 4], labels[2, 10] = (IGNORED,) * 3
    batch = {"inputs": tokens[:, :-1], "labels": labels, "segment_ids": segments}
    return {name: x.astype(np.int32) for name, x in batch.items()}


def losses(steps, params, batch, hidden):
    """Loops: the mean after the prefix, the mean over what is hidden, and the number of the first.

    Of the second row only five tokens are in the prefix.
    """
    lengths = [PREFIX, 5, PREFIX]
    prefix = np.arange(TIME) < np.array(lengths)[:, None]
    inputs = np.where(hidden, CONFIG.vocab_size - 1, batch["inputs"])
    logits, _ = jax.jit(lambda params, tokens, prefix, segment_ids: steps.merge(params)(
        tokens, prefix=prefix, segment_ids=segment_ids
    ))(params, inputs, prefix, batch["segment_ids"])  # fmt: skip
    after, masked = [], []
    for b in range(BATCH):
        for t in range(TIME):
            scores = np.asarray(logits[b, t], np.float64)
            surprise = np.log(np.sum(np.exp(scores))) - scores
            if hidden[b, t]:
                assert t < lengths[b]
                masked.append(surprise[batch["inputs"][b, t]])
            if t >= lengths[b] and batch["labels"][b, t] != IGNORED:
                after.append(surprise[batch["labels"][b, t]])
    return np.mean(after), np.mean(masked) if masked else 0.0, len(after)


def test_the_loss_is_that_of_what_follows_and_a_share_of_what_is_masked(steps):
    batch, params = made(), steps.init()["params"]
    prefix = np.asarray(CONFIG.text_prefix(jnp.asarray(batch["segment_ids"])))
    hidden = np.asarray(prefix_linear.mask(prefix, CONFIG.mask_share, KEY))
    assert hidden[:, :5].any(axis=1).all() and not hidden[prefix].all()
    after, masked, _ = losses(steps, params, batch, hidden)
    got = jax.jit(steps.loss)(params, batch, jnp.int32(0), KEY)
    # float32 against float64: 1.2e-7 was measured, one unit in the last place.
    np.testing.assert_allclose(got, after + 0.25 * masked, rtol=1.2e-6)


def test_evaluation_gives_the_prefix_and_scores_what_follows(steps):
    batch, params = made(), steps.init()["params"]
    after, _, count = losses(steps, params, batch, np.zeros((BATCH, TIME), bool))
    nats, labels = steps.evaluate(params, batch, jnp.int32(0))
    assert labels == count
    np.testing.assert_allclose(nats / labels, after, rtol=1.2e-6)


def test_masks_are_drawn_within_the_prefix_at_their_share():
    prefix = np.arange(64) < np.full((500, 1), 32)
    hidden = np.asarray(prefix_linear.mask(prefix, 0.15, KEY))
    assert not hidden[:, 32:].any()
    assert abs(hidden[:, :32].mean() - 0.15) < 0.011  # four standard errors


def test_a_causal_reader_is_trained_on_every_label():
    segments = jnp.zeros((2, 6), jnp.int32)
    assert dataclasses.replace(CONFIG, reads_prefix=False).text_prefix(segments) is None


def test_the_command_line_trains_on_the_joint_loss(tmp_path):
    """With its weight at 4, a first loss near 5 log 272 instead of log 272."""
    mixers = prefix_linear.TINY.mixers
    config = dataclasses.replace(CONFIG, mixers=mixers, mask_weight=4.0, mask_share=0.15)
    words = ["train", "jaxrec.models.prefix_linear:TINY", "--runs", str(tmp_path), "--name", "run"]
    words += ["--data", str(write_text(tmp_path / "text")), "--steps", "2", "--batch", "8"]
    words += ["--time", "16", "--log-every", "1", "--eval-batches", "1"]
    assert main([*words, *model_options(config, prefix_linear.TINY)]) == 0
    lines = read(tmp_path / "run" / "metrics.jsonl")
    first, *_ = [line["loss"] for line in lines if line["kind"] == "train"]
    *_, loss = [line["loss"] for line in lines if line["kind"] == "valid"]
    assert 4.5 < first / np.log(272) < 6
    assert 0.5 < loss["-"] / np.log(272) < 1.5
