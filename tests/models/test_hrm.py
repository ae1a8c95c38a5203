"""HRM: one-step gradients, memory that does not grow with cycles, rows that are replaced, sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.models.hrm import MAZE_27M, SUDOKU_27M, HRMConfig, Latent, Rows
from jaxrec.training import pondering

SMALL = HRMConfig(
    vocab_size=5,
    length=6,
    width=8,
    heads=2,
    puzzles=3,
    puzzle_width=12,
    high_layers=1,
    low_layers=1,
    max_segments=3,
)
BATCH = 4


@pytest.fixture(scope="module")
def model():
    model = SMALL.build(rngs=nnx.Rngs(0))
    model.puzzle_vectors[...] = jax.random.normal(jax.random.key(1), (3, 12))
    return model


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return Rows(
        jnp.asarray(rng.integers(0, 5, (BATCH, 6)), jnp.int32),
        jnp.asarray(rng.integers(0, 5, (BATCH, 6)), jnp.int32),
        jnp.asarray(rng.integers(0, 3, BATCH), jnp.int32),
    )


def with_cycles(model, **fields):
    """The same parameters under another configuration."""
    _, state = nnx.split(model)
    other = dataclasses.replace(SMALL, **fields)
    return nnx.merge(nnx.graphdef(other.build(rngs=nnx.Rngs(0))), state)


def loss(model, rows, latent):
    logits, q, _ = model(rows.tokens, latent, model.vectors_of(rows.puzzle))
    return jnp.sum(jnp.sin(logits)) + jnp.sum(q)


def test_the_gradient_is_that_of_the_last_two_calls(model, rows):
    """Everything before is computed by itself and held fixed."""
    deep = with_cycles(model, high_cycles=3, low_cycles=2)
    start = model.start(BATCH)
    # Two cycles, and the first call of `low` in the third.
    z = with_cycles(model, high_cycles=2, low_cycles=2)(
        rows.tokens, start, model.vectors_of(rows.puzzle)
    )[2]
    low = with_cycles(model, high_cycles=1, low_cycles=1)(
        rows.tokens, z, model.vectors_of(rows.puzzle)
    )[2].low
    one = with_cycles(model, high_cycles=1, low_cycles=1)
    got = jax.jit(jax.grad(loss))(deep, rows, start)
    want = jax.jit(jax.grad(loss))(one, rows, Latent(z.high, low))
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


def test_the_gradient_through_all_calls_of_the_last_cycle(model, rows):
    """As TRM (arXiv:2510.04871) has it: cycles before are computed by themselves and held fixed."""
    deep = with_cycles(model, high_cycles=3, low_cycles=2, low_backprop=2)
    start, vectors = model.start(BATCH), model.vectors_of(rows.puzzle)
    z = with_cycles(model, high_cycles=2, low_cycles=2)(rows.tokens, start, vectors)[2]
    one = with_cycles(model, high_cycles=1, low_cycles=2, low_backprop=2)
    got = jax.jit(jax.grad(loss))(deep, rows, start)
    want = jax.jit(jax.grad(loss))(one, rows, z)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


def test_full_backpropagation_differs_only_in_the_gradient(model, rows):
    start = model.start(BATCH)
    full = with_cycles(model, high_backprop=2, low_backprop=2)
    value, gradient = jax.jit(jax.value_and_grad(loss))(full, rows, start)
    short, one_step = jax.jit(jax.value_and_grad(loss))(model, rows, start)
    np.testing.assert_allclose(value, short, rtol=1e-6)
    kernels = [g.low.attention.query.kernel[...] for g in (gradient, one_step)]
    assert np.max(np.abs(kernels[0] - kernels[1])) > 1e-3 * np.max(np.abs(kernels[1]))


@pytest.mark.parametrize("low_backprop", [1, 2])
def test_memory_does_not_grow_with_cycles(model, rows, low_backprop):
    def bytes_of(cycles):
        deep = with_cycles(model, high_cycles=cycles, low_cycles=cycles, low_backprop=low_backprop)
        compiled = jax.jit(jax.grad(loss)).lower(deep, rows, model.start(BATCH)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_of(8) <= 1.1 * bytes_of(2)


def test_only_rows_that_have_halted_are_replaced(model, rows):
    carry = model.init_carry(rows)._replace(
        steps=jnp.full(BATCH, 2, jnp.int32),
        halted=jnp.array([True, False, False, True]),
        latent=jax.tree.map(jnp.zeros_like, model.start(BATCH)),
    )
    offered = Rows(rows.tokens + 1, rows.labels + 1, (rows.puzzle + 1) % 3)
    taken = pondering.take_next(model, carry, offered)
    np.testing.assert_array_equal(taken.steps, [0, 2, 2, 0])
    np.testing.assert_array_equal(taken.rows.tokens[1:3], rows.tokens[1:3])
    np.testing.assert_array_equal(taken.rows.labels[::3], offered.labels[::3])
    np.testing.assert_array_equal(taken.rows.puzzle[::3], offered.puzzle[::3])
    np.testing.assert_array_equal(taken.latent.low[0], model.start(1).low[0])
    assert not np.any(taken.latent.high[1])


def test_rows_are_independent(model, rows):
    """A row's answer does not depend on what else is in the batch."""
    vectors = model.vectors_of(rows.puzzle)
    together = model(rows.tokens, model.start(BATCH), vectors)[0]
    alone = model(rows.tokens[:1], model.start(1), vectors[:1])[0]
    np.testing.assert_allclose(together[:1], alone, rtol=1e-4, atol=1e-5)


def test_published_sizes():
    """27,275,266 for Sudoku, without the vectors of the puzzles and the states' beginnings."""

    def count(config):
        model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))

    assert count(SUDOKU_27M) == 27_275_266
    assert count(MAZE_27M) == 27_275_266 - 2 * 5 * 512
    assert SUDOKU_27M.mlp_width == 1536 and SUDOKU_27M.puzzle_tokens == 1


def test_the_states_begin_with_deviation_one_and_are_not_trained():
    model = dataclasses.replace(SUDOKU_27M, high_layers=1, low_layers=1).build(rngs=nnx.Rngs(0))
    assert 0.9 < np.std(model.high_start[...]) < 1.1
    assert not np.any(model.puzzle_vectors[...])
    trained = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert {"high_start", "low_start", "puzzle_vectors"}.isdisjoint(trained)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 10}, "width / heads must be even"),
        ({"width": 9}, "multiple of heads"),
        ({"exploration": 1.5}, "exploration must be <= 1"),
        ({"exploration": -0.1}, "exploration must be >= 0"),
        ({"low_cycles": 0}, "low_cycles must be >= 1"),
        ({"max_segments": 0}, "max_segments must be >= 1"),
        ({"positions": "none"}, "positions must be"),
        ({"normaliser": "argmax"}, "normaliser must be"),
    ],
)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **fields)


def test_puzzles_of_another_length_or_without_vectors_are_refused(model, rows):
    with pytest.raises(ValueError, match="a puzzle has 6 tokens, got 5"):
        model(rows.tokens[:, :5], model.start(BATCH), model.vectors_of(rows.puzzle))
    with pytest.raises(ValueError, match="vectors must be of shape"):
        model(rows.tokens, model.start(BATCH))
