"""The sLSTM by Newton's method equals its sequential scan, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.newton import slstm_newton_scan
from jaxrec.ops.time.slstm import SLSTMState, slstm_scan

BATCH, TIME, HEADS, SIZE = 2, 20, 2, 3


def draw(seed=0, gain=0.5):
    rng = np.random.default_rng(seed)
    recurrent = gain * rng.normal(size=(4, HEADS, SIZE, SIZE))
    x = rng.normal(size=(BATCH, TIME, 4, HEADS, SIZE))
    parts = rng.normal(size=(4, BATCH, HEADS, SIZE))
    parts[2] = 0.5 + np.abs(parts[2])
    recurrent, x, parts = (z.astype(np.float32) for z in (recurrent, x, parts))
    return recurrent, x, SLSTMState(*parts)


def sums(state):
    """h, c and n without their common scale."""
    scale = jnp.exp(state.maximum)
    return state.hidden, state.cell * scale, state.normaliser * scale


def values_and_gradients(scan, recurrent, x, state, weights):
    def loss(recurrent, x, state):
        y, last, *rest = scan(x, recurrent, state)
        total = jnp.sum(weights * y) + sum(jnp.sum(jnp.sin(part)) for part in sums(last))
        return total, ((y, sums(last)), rest)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, (values, rest)), gradients = run(recurrent, x, state)
    return (values, gradients), rest


@pytest.mark.parametrize("method", ["newton", "quasi_newton", "sequential"])
@pytest.mark.parametrize("with_resets", [False, True])
def test_equals_the_sequential_scan(method, with_resets):
    recurrent, x, state = draw()
    weights = np.random.default_rng(1).normal(size=(BATCH, TIME, HEADS, SIZE)).astype(np.float32)
    reset = np.random.default_rng(2).random((BATCH, TIME)) < 0.2 if with_resets else None

    def plain(x, recurrent, state):
        return slstm_scan(x, recurrent, state, reset=reset)

    def ours(x, recurrent, state):
        return slstm_newton_scan(x, recurrent, state, reset=reset, method=method, window=8)

    want, _ = values_and_gradients(plain, recurrent, x, state, weights)
    got, [info] = values_and_gradients(ours, recurrent, x, state, weights)
    assert info.converged
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # Ten times the gap between float32 and float64 of the sequential scan, 8e-7.
        np.testing.assert_allclose(left, right, rtol=0, atol=8e-6 * max(1, np.max(np.abs(right))))


def test_nothing_before_the_first_step():
    recurrent, x, _ = draw()
    want, want_last = slstm_scan(x, recurrent)
    got, last, info = slstm_newton_scan(x, recurrent, method="newton")
    np.testing.assert_allclose(got, want, atol=2e-6)
    for left, right in zip(sums(last), sums(want_last), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)
    assert info.converged
    assert 2 <= info.iterations <= 8
    np.testing.assert_array_equal(last.normaliser, 1)


def test_it_may_be_cut_and_go_on_by_the_other_method():
    recurrent, x, state = draw()
    want, _ = slstm_scan(x, recurrent, state)
    left, middle, _ = slstm_newton_scan(x[:, :7], recurrent, state, method="newton")
    right, _ = slstm_scan(x[:, 7:], recurrent, middle)
    np.testing.assert_allclose(jnp.concatenate([left, right], axis=1), want, atol=2e-6)


def test_gates_of_any_size_stay_finite():
    recurrent, x, state = draw()
    x[:, ::3, 1] += 200
    x[:, ::4, 2] -= 200
    want, _ = slstm_scan(x, recurrent, state)
    got, last, info = slstm_newton_scan(x, recurrent, state, method="newton")
    # A step is settled at 5e-7 of its largest number, here a logarithm of 200.
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert info.converged
    assert all(np.all(np.isfinite(part)) for part in last)


def test_what_does_not_fit_is_named():
    recurrent, x, _ = draw()
    with pytest.raises(ValueError, match=r"x must be \(b t 4 h n\)"):
        slstm_newton_scan(x[:, :, :3], recurrent)
