"""The compiled functions of a run: what the guard keeps, and what precision changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.models.linear_rnn import LinearRNNConfig
from jaxrec.training.config import TrainConfig
from jaxrec.training.data.batches import IGNORED
from jaxrec.training.sharding import build_mesh
from jaxrec.training.step import build_steps, cast_matrices, is_matrix
from tests.training.small import LINEAR_RNN, UNIVERSAL

CONFIG = TrainConfig(steps=10, batch=2, time=8)


@pytest.fixture(scope="module")
def steps():
    return build_steps(LINEAR_RNN, CONFIG, build_mesh("data=1"))


def batch(seed=0):
    rng = np.random.default_rng(seed)
    inputs, labels = rng.integers(0, 256, (2, 2, 8), dtype=np.int32)
    ones = np.ones((2, 8), np.int32)
    return jax.tree.map(jnp.asarray, {"inputs": inputs, "labels": labels, "segment_ids": ones})


def test_a_step_lowers_the_loss_of_its_batch(steps):
    state = steps.init()
    losses = []
    for _ in range(8):
        state, metrics = steps.train(state, batch(), jnp.int32(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.01
    assert int(state["step"]) == 8 and bool(metrics["healthy"])


def test_after_a_bad_step_nothing_changes_any_more(steps):
    state = steps.init()
    table = state["params"]["embedding"]["table"]
    state["params"]["embedding"]["table"] = table.at[3].set(jnp.nan)
    before = jax.device_get(state["params"])
    bad = batch()
    bad["inputs"] = bad["inputs"].at[0, 0].set(3)
    for good_or_bad in (bad, batch(1)):
        state, metrics = steps.train(state, good_or_bad, jnp.int32(0))
        assert not metrics["healthy"]
        assert int(state["step"]) == 0
    for left, right in zip(jax.tree.leaves(before), jax.tree.leaves(state["params"]), strict=True):
        np.testing.assert_array_equal(left, right)


class Steep(nnx.Module):
    """Its loss is that of the model, and its gradient is not finite."""

    def __init__(self, model):
        self.config, self.model = model.config, model

    def __call__(self, tokens, **options):
        return self.model(tokens, **options)

    def train_call(self, tokens, *, key, **options):
        logits, _ = self(tokens, **options)
        scale = self.model.norm.scale[...][0]
        nothing = scale - jax.lax.stop_gradient(scale)
        # The slope of a root at zero; or one whose square is beyond float32, as in a global norm.
        nothing = jax.lax.cond(
            tokens[0, 0] == 0, lambda x: jnp.sqrt(x * x), lambda x: 1e25 * x, nothing
        )
        return logits, jnp.broadcast_to(nothing, tokens.shape)


class SteepConfig(LinearRNNConfig):
    def build(self, *, rngs):
        return Steep(super().build(rngs=rngs))


@pytest.fixture(scope="module")
def steep():
    return build_steps(SteepConfig(**vars(LINEAR_RNN)), CONFIG, build_mesh("data=1"))


@pytest.mark.parametrize(("first", "norm"), [(0, np.nan), (1, np.inf)], ids=["nan", "too large"])
def test_a_gradient_that_is_not_finite_is_noticed_where_the_loss_is(steep, first, norm):
    """Cut to a global norm, the large one becomes zero: no parameter would show it."""
    state = steep.init()
    before = jax.device_get(state["params"])
    bad = batch()
    bad["inputs"] = bad["inputs"].at[0, 0].set(first)
    state, metrics = steep.train(state, bad, jnp.int32(0))
    assert np.isfinite(metrics["loss"])
    np.testing.assert_equal(np.asarray(metrics["grad_norm"]), np.float32(norm))
    assert not metrics["healthy"] and int(state["step"]) == 0
    for left, right in zip(jax.tree.leaves(before), jax.tree.leaves(state["params"]), strict=True):
        np.testing.assert_array_equal(left, right)


def test_evaluation_sums_over_labels(steps):
    params = steps.init()["params"]
    nats, labels = steps.evaluate(params, batch(), jnp.int32(0))
    assert labels == 16
    assert 4 < nats / labels < 8  # near log(272) before training


def test_only_matrices_are_cast(steps):
    params = steps.init()["params"]
    model = steps.merge(params)
    cast = cast_matrices(params, is_matrix(model), jnp.bfloat16)
    assert cast["embedding"]["table"].dtype == jnp.bfloat16
    assert cast["blocks"]["mixer"]["recurrence"]["decay"].dtype == jnp.float32
    assert cast["norm"]["scale"].dtype == jnp.float32


def test_what_a_model_pays_in_training_is_no_part_of_its_evaluation():
    """Of the tokens that count, each its own ponder time; of those that do not, none."""
    config = dataclasses.replace(CONFIG, accumulate=2)
    steps = build_steps(UNIVERSAL, config, build_mesh("data=1"))
    state = steps.init()
    some = batch()
    some["labels"] = some["labels"].at[:, 5:].set(IGNORED)
    some["labels"] = some["labels"].at[0, 3].set(IGNORED)
    ponder = jax.jit(lambda params: steps.merge(params).pondered(some["inputs"])[1])
    time = np.asarray(ponder(state["params"]).time)
    nats, labels = steps.evaluate(state["params"], some, jnp.int32(0))
    paid = UNIVERSAL.ponder_weight * np.mean(time[np.asarray(some["labels"]) != IGNORED])
    _, metrics = steps.train(state, some, jnp.int32(0))
    assert paid > 1e-3
    np.testing.assert_allclose(metrics["loss"] - nats / labels, paid, atol=2e-6)
