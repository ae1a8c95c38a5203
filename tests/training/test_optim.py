"""Optimizers against plain NumPy loops in float64, and schedules at the steps that matter."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrec.training import optim
from jaxrec.training.config import OptimizerConfig

SHAPES = {"block": {"kernel": (2, 3, 4), "qk_bias": (2, 1, 3)}, "embedding": (5, 3), "scale": (4,)}
STACKED = {"block": {"kernel": 1, "qk_bias": 1}, "embedding": 0, "scale": 0}


def draw(rng, scale=1.0):
    shapes = {"is_leaf": lambda shape: isinstance(shape, tuple)}
    return jax.tree.map(lambda shape: scale * rng.standard_normal(shape), SHAPES, **shapes)


def run(config, params, gradients, stacked=STACKED):
    """The parameters after the given gradients, by the optimizer under test."""
    params = jax.tree.map(jnp.float32, params)
    optimizer = optim.build(config, len(gradients), params, stacked)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(params, state, jax.tree.map(jnp.float32, gradient))
    return params


def naive_adam_atan2(config, p, gradients, rates, decays):
    """One tensor of one layer, in float64, in the words of the paper's table."""
    b1, b2 = config.beta1, config.beta2
    m, v = gradients[0], gradients[0] ** 2
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = b1 * m + (1 - b1) * g
        v = np.maximum(b2 * v + (1 - b2) * g**2, config.epsilon**2)
        clipped = lr / max(1.0, math.sqrt(np.mean(g**2 / v)))
        if decays:
            p = p * (1 - lr / config.learning_rate * config.weight_decay)
        p = p - clipped / (1 - b1**t) * np.arctan2(m, np.sqrt(v) / math.sqrt(1 - b2**t))
    return p


def naive_adamw(config, p, gradients, rates, decays):
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g**2
        direction = (
            m / (1 - config.beta1**t) / (np.sqrt(v / (1 - config.beta2**t)) + config.epsilon)
        )
        p = p - lr * (direction + (config.weight_decay * p if decays else 0.0))
    return p


def naive_lamb(config, p, gradients, rates, decays):
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g**2
        step = m / (1 - config.beta1**t) / (np.sqrt(v / (1 - config.beta2**t)) + config.epsilon)
        if decays:
            step = step + config.weight_decay * p
            step = step * np.linalg.norm(p) / np.linalg.norm(step)
        p = p - lr * step
    return p


@pytest.mark.parametrize(
    ("name", "naive"),
    [("adam_atan2", naive_adam_atan2), ("adamw", naive_adamw), ("lamb", naive_lamb)],
)
def test_equals_the_plain_loop(name, naive):
    config = OptimizerConfig(
        name=name,
        learning_rate=1e-2,
        weight_decay=0.03,
        clip_norm=None,
        warmup_steps=3,
        final_fraction=0.2,
    )
    rng = np.random.default_rng(0)
    params = draw(rng)
    gradients = [
        draw(rng, scale) for scale in (1.0, 0.1, 0.1, 30.0, 1.0, 0.01, 1.0, 1.0)
    ]  # with a spike
    result = run(config, params, gradients)
    rates = [float(optim.schedule(config, len(gradients))(step)) for step in range(len(gradients))]

    for layer in range(2):  # per tensor means per layer of a stack
        for leaf, decays in (("kernel", True), ("qk_bias", False)):
            series = [gradient["block"][leaf][layer] for gradient in gradients]
            expected = naive(config, params["block"][leaf][layer], series, rates, decays)
            # float32 against float64 over 8 steps: measured 2e-7; ten times that
            np.testing.assert_allclose(result["block"][leaf][layer], expected, atol=2e-6)
    for leaf, decays in (("embedding", True), ("scale", False)):
        series = [gradient[leaf] for gradient in gradients]
        np.testing.assert_allclose(
            result[leaf], naive(config, params[leaf], series, rates, decays), atol=2e-6
        )


def test_update_clipping_tames_a_spike():
    config = OptimizerConfig(
        name="adam_atan2", weight_decay=0.0, clip_norm=None, schedule="constant"
    )
    config_adam = OptimizerConfig(
        name="adamw", weight_decay=0.0, clip_norm=None, schedule="constant"
    )
    calm = {"kernel": np.full((2, 2), 1e-3)}
    spike = {"kernel": np.full((2, 2), 1e3)}
    zero = {"kernel": np.zeros((2, 2))}

    def moved_by_spike(config):
        before = run(config, zero, [calm] * 20, None)
        after = run(config, zero, [calm] * 20 + [spike], None)
        return float(jnp.abs(after["kernel"] - before["kernel"]).max())

    assert moved_by_spike(config) < 0.5 * moved_by_spike(config_adam)


def test_lamb_moves_a_tensor_that_is_zero():
    """Its length is no measure of a step, and a step of length zero has none either."""
    config = OptimizerConfig(name="lamb", weight_decay=0.0, warmup_steps=0, schedule="constant")
    zero, one = {"kernel": np.zeros((2, 2))}, {"kernel": np.ones((2, 2))}
    np.testing.assert_allclose(
        run(config, zero, [one], None)["kernel"], -config.learning_rate, rtol=1e-5
    )
    np.testing.assert_array_equal(run(config, one, [zero], None)["kernel"], one["kernel"])


def test_a_zero_gradient_moves_nothing():
    config = OptimizerConfig(name="adam_atan2", weight_decay=0.0)
    zero = {"kernel": np.zeros((2, 2))}
    params = {"kernel": np.ones((2, 2))}
    np.testing.assert_array_equal(run(config, params, [zero] * 3, None)["kernel"], params["kernel"])


def test_a_constant_gradient_moves_as_the_paper_says():
    # g constant: m = g, v = g^2, so the first update is lr / (1 - b1) * atan(sqrt(1 - b2))
    config = OptimizerConfig(
        name="adam_atan2", weight_decay=0.0, warmup_steps=0, schedule="constant", clip_norm=None
    )
    zero, one = {"kernel": np.zeros((2, 2))}, {"kernel": np.ones((2, 2))}
    expected = -config.learning_rate / 0.1 * math.atan(math.sqrt(0.05))
    np.testing.assert_allclose(run(config, zero, [one], None)["kernel"], expected, rtol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    config = OptimizerConfig(
        name="adamw", clip_norm=1.0, epsilon=1.0, weight_decay=0.0, schedule="constant"
    )
    zero = {"a": np.zeros((2, 2)), "b": np.zeros(5)}
    small = {"a": np.full((2, 2), 0.3), "b": np.full(5, 0.1)}
    norm = math.sqrt(4 * 0.09 + 5 * 0.01)
    large = jax.tree.map(lambda g: g * 1000, small)
    unit = jax.tree.map(lambda g: g / norm, small)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5),
        run(config, zero, [large], None),
        run(config, zero, [unit], None),
    )


def test_decay_mask_spares_vectors_and_named_parameters():
    params = jax.tree.map(
        lambda shape: np.zeros(shape), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )
    assert optim.decay_mask(params, STACKED) == {
        "block": {"kernel": True, "qk_bias": False},
        "embedding": True,
        "scale": False,
    }
    stacked_vectors = {"gate": np.zeros((6, 4))}
    assert optim.decay_mask(stacked_vectors, {"gate": 1}) == {"gate": False}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"schedule": "cosine", "final_fraction": 0.1},
            {0: 0.25, 3: 1.0, 4: 1.0, 12: 0.55, 20: 0.1, 99: 0.1},
        ),
        ({"schedule": "constant"}, {0: 0.25, 3: 1.0, 20: 1.0, 99: 1.0}),
        (
            {"schedule": "trapezoid", "cooldown_steps": 8, "final_fraction": 0.0},
            {0: 0.25, 4: 1.0, 12: 1.0, 16: 0.5, 19: 0.125, 20: 0.0, 99: 0.0},
        ),
        ({"schedule": "trapezoid"}, {0: 0.25, 19: 1.0, 99: 1.0}),
    ],
)
def test_schedule_at_the_steps_that_matter(options, expected):
    rate = optim.schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=4, **options), steps=20)
    for step, share in expected.items():
        np.testing.assert_allclose(
            float(rate(step)), 2.0 * share, rtol=1e-6, err_msg=f"step {step}"
        )
        assert rate(step).dtype == jnp.float32


def test_a_run_shorter_than_its_warm_up_only_grows():
    rate = optim.schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=100), steps=10)
    np.testing.assert_allclose(
        [float(rate(step)) for step in range(10)], np.arange(1, 11) / 100, rtol=1e-6
    )


def test_ema():
    average = optim.ema_update({"a": jnp.float32(1.0)}, {"a": jnp.float32(2.0)}, 0.75)
    assert float(average["a"]) == 1.25


def test_atan2_is_its_equations():
    """Three steps beside NumPy; zero gradients move nothing."""
    rng = np.random.default_rng(0)
    rule, beta1, beta2 = optim.scale_by_atan2(0.9, 0.95), 0.9, 0.95
    params = {"moved": jnp.ones((3, 2)), "left": jnp.ones(2)}
    state, m, v = rule.init(params), np.zeros((3, 2)), np.zeros((3, 2))
    for t in range(1, 4):
        g = rng.normal(size=(3, 2)).astype(np.float32)
        moves, state = rule.update({"moved": jnp.asarray(g), "left": jnp.zeros(2)}, state)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        want = np.arctan2(m, np.sqrt(v) / np.sqrt(1 - beta2**t)) / (1 - beta1**t)
        np.testing.assert_allclose(moves["moved"], want, rtol=1e-5)
        assert not np.any(moves["left"])


def test_sign_sgd_moves_only_the_rows_that_were_read():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(6, 3)).astype(np.float32)
    rows, gradient = np.array([4, 1, 4, 4]), rng.normal(size=(4, 3)).astype(np.float32)
    want = table.copy()
    for row in (1, 4):
        total = gradient[rows == row].sum(axis=0)
        want[row] = want[row] * (1 - 0.1 * 0.5) - 0.1 * np.sign(total)
    got = jax.jit(functools.partial(optim.sign_sgd_rows, weight_decay=0.5))(
        jnp.asarray(table), jnp.asarray(rows, jnp.int32), jnp.asarray(gradient), rate=0.1
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_array_equal(got[0], table[0])
