"""What the laws do not say of `wkv`: numbers by hand, weights of any size, devices, its doors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.time import WKVState, wkv
from tests import references
from tests.ops.time.test_sharded import mesh

run = jax.jit(wkv, static_argnames="axis")
# Ten times the largest gap between the loop in float32 and in float64, 3e-7 of numbers around 1.
TOLERANCE = 3e-6


def inputs(batch=2, time=8, width=3):
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, batch, time, width)).astype(np.float32)
    rate = rng.uniform(0.1, 2.0, width).astype(np.float32)
    return k, v, rate, rng.normal(size=width).astype(np.float32)


def test_three_steps_by_hand():
    """Weights of 1 that halve each step; the present one counts as much as 3."""
    v = np.array([[[4.0], [8.0], [0.0]]], np.float32)
    rate, bonus = np.log([2.0]).astype(np.float32), np.log([3.0]).astype(np.float32)
    y, last = run(np.zeros_like(v), v, rate, bonus)
    np.testing.assert_allclose(y[0, :, 0], [4, (4 + 24) / 4, (2 + 8) / 4.5], rtol=1e-6)
    weight = np.exp(last.maximum)
    np.testing.assert_allclose(last.numerator * weight, [[1 + 4]], rtol=1e-6)
    np.testing.assert_allclose(last.denominator * weight, [[1 / 4 + 1 / 2 + 1]], rtol=1e-6)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_only_differences_of_keys_count(shift):
    """The plain sums would overflow or vanish, and their ratio be nan."""
    k, v, rate, bonus = inputs()
    k = np.round(k * 64) / 64  # so that adding the shift rounds nothing
    y, _ = run(k, v, rate, bonus)
    moved, moved_last = run(k + np.float32(shift), v, rate, bonus)
    np.testing.assert_allclose(moved, y, atol=2e-3)  # float32 keeps 1e-3 of 1e4
    for leaf in moved_last:
        assert np.all(np.isfinite(leaf))

    gradient = jax.jit(jax.grad(lambda *case: jnp.sum(wkv(*case)[0] ** 2), argnums=range(4)))
    for leaf in gradient(k + np.float32(shift), v, rate, bonus):
        assert np.all(np.isfinite(leaf)) and np.any(leaf != 0)


def test_elements_with_keys_of_other_sizes_do_not_talk():
    k, v, rate, bonus = inputs()
    k[1] *= 1e4
    y, _ = run(k, v, rate, bonus)
    assert np.all(np.isfinite(y))
    alone, _ = run(k[:1], v[:1], rate, bonus)
    np.testing.assert_allclose(y[:1], alone, atol=TOLERANCE)


@pytest.mark.parametrize("shift", [-3.0, 5.0])
def test_a_state_may_be_scaled_in_any_way(shift):
    k, v, rate, bonus = inputs()
    _, state = run(k, v, rate, bonus)
    scale = np.exp(np.float32(shift))
    other = WKVState(state[0] * scale, state[1] * scale, state[2] - np.float32(shift))
    y, last = run(k, v, rate, bonus, state)
    got, got_last = run(k, v, rate, bonus, other)
    np.testing.assert_allclose(got, y, atol=TOLERANCE)
    for left, right in zip(got_last[:2], last[:2], strict=True):
        weight, other_weight = np.exp(last.maximum), np.exp(got_last.maximum)
        np.testing.assert_allclose(left * other_weight, right * weight, rtol=1e-5)


def test_the_gradient_to_the_scale_of_a_state():
    """A larger m is a larger a and b: dy/dm = a dy/da + b dy/db, both times e^m."""
    k, v, rate, bonus = inputs()
    _, state = run(k, v, rate, bonus)
    gradient = jax.jit(jax.grad(lambda state: jnp.sum(wkv(k, v, rate, bonus, state)[0] ** 2)))(
        state
    )
    want = gradient.numerator * state.numerator + gradient.denominator * state.denominator
    np.testing.assert_allclose(gradient.maximum, want, atol=TOLERANCE)


def test_over_devices():
    k, v, rate, bonus = inputs(time=24)
    _, state = run(*inputs())
    reset = np.random.default_rng(1).random((2, 24)) < 0.1
    want = run(k, v, rate, bonus, state, reset=reset)
    with jax.set_mesh(mesh({"data": 2, "seq": 4})):
        got = jax.device_get(run(k, v, rate, bonus, state, reset=reset, axis="seq"))
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(left, right, atol=TOLERANCE)


def test_dtypes():
    case = [z.astype(jnp.bfloat16) for z in inputs()]
    y, last = jax.eval_shape(wkv, *case)
    assert y.dtype == jnp.bfloat16 and all(leaf.dtype == jnp.float32 for leaf in last)
    with jax.enable_x64(True):
        case = [z.astype(np.float64) for z in inputs()]
        y, last = run(*case)
        assert y.dtype == np.float64 and all(leaf.dtype == np.float64 for leaf in last)
        nothing = np.zeros((2, 3))
        want, _, _ = references.wkv(*case, nothing, nothing, np.zeros((2, 8), bool))
        np.testing.assert_allclose(y, want, atol=1e-14)


CASE = dict(zip(("k", "v", "rate", "bonus"), inputs(2, 3, 4), strict=True))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"k": CASE["k"][0]}, r"k must be \(b t e\), got shape \(3, 4\)"),
        ({"k": CASE["k"][:, :0]}, r"at least one step, got t = 0 in k of shape \(2, 0, 4\)"),
        ({"v": CASE["v"][:, :2]}, r"v must be \(b t e\) = \(2, 3, 4\), got \(2, 2, 4\)"),
        ({"rate": CASE["rate"][:2]}, r"rate must be \(e\) = \(4,\), got \(2,\)"),
        ({"bonus": CASE["k"]}, r"bonus must be \(e\) = \(4,\), got \(2, 3, 4\)"),
        ({"k": CASE["k"].astype(np.int32)}, r"k must be real floats, got int32"),
        (
            {"state": WKVState(*np.zeros((3, 3, 4), np.float32))},
            r"state.numerator must be \(b e\) = \(2, 4\), got \(3, 4\)",
        ),
        (
            {"reset": np.zeros((2, 3), np.int32)},
            r"reset must be bool \(b t\) = \(2, 3\), got int32 \(2, 3\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    with pytest.raises(ValueError, match=f"^wkv: {message}|^wkv: needs {message}"):
        wkv(**(CASE | changed))
