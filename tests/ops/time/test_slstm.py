"""What the laws do not say of `slstm_scan`: numbers by hand, gates of any size, its doors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.time import SLSTMState, slstm_scan
from tests import references

run = jax.jit(slstm_scan)
# Ten times the largest gap between the loop in float32 and in float64, 3e-7 of numbers around 1.
TOLERANCE = 3e-6


def inputs(batch=2, time=8, heads=2, size=3):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, time, 4, heads, size)).astype(np.float32)
    return x, 0.5 * rng.normal(size=(4, heads, size, size)).astype(np.float32)


def loop(x, recurrent):
    x, recurrent = x.astype(np.float64), recurrent.astype(np.float64)
    batch, time, _, heads, size = x.shape
    return references.slstm(
        x, recurrent, *np.zeros((3, batch, heads, size)), np.zeros((batch, time), bool)
    )


def test_two_steps_by_hand():
    """Gates that are open: a mean of tanh(z), with weights of 1 and 3."""
    z, i = [0.5, -1.0], [0.0, np.log(3)]
    x = np.array([z, i, [40, 40], [40, 40]], np.float32).T.reshape(1, 2, 4, 1, 1)
    h, last = run(x, np.zeros((4, 1, 1, 1), np.float32))
    want = [np.tanh(0.5), (np.tanh(0.5) + 3 * np.tanh(-1.0)) / 4]
    np.testing.assert_allclose(h.ravel(), want, rtol=1e-6)
    assert last.normaliser.item() * np.exp(last.maximum.item()) == pytest.approx(4, rel=1e-6)


def test_the_state_read_is_that_of_the_same_head():
    x, recurrent = inputs()
    h, _ = run(x, recurrent)
    other = x.copy()
    other[:, 0, :, 0] += 1
    changed, _ = run(other, recurrent)
    np.testing.assert_array_equal(changed[:, :, 1], h[:, :, 1])
    assert np.all(np.any(changed[:, 1:, 0] != h[:, 1:, 0], axis=-1))


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_input_gates_of_any_size(shift):
    """Only differences of input gates count but for the forget gates; e^300 does not exist."""
    x, recurrent = inputs()
    y, _ = run(x, recurrent)
    moved = x.copy()
    moved[0, :, 1] += np.float32(shift)
    got, last = run(moved, recurrent)
    np.testing.assert_allclose(got[0], y[0], atol=1e-3)  # float32 keeps 3e-5 of 300
    np.testing.assert_array_equal(got[1], y[1])
    assert all(np.all(np.isfinite(leaf)) for leaf in last)
    gradient = jax.jit(jax.grad(lambda *case: jnp.sum(slstm_scan(*case)[0] ** 2), argnums=(0, 1)))
    assert all(np.all(np.isfinite(leaf)) for leaf in gradient(moved, recurrent))


def test_without_a_state_it_begins_with_nothing():
    x, recurrent = inputs()
    np.testing.assert_allclose(run(x, recurrent)[0], loop(x, recurrent)[0], atol=TOLERANCE)


def test_dtypes():
    x, recurrent = inputs()
    h, last = jax.eval_shape(slstm_scan, x.astype(jnp.bfloat16), recurrent.astype(jnp.bfloat16))
    assert h.dtype == jnp.bfloat16 and all(leaf.dtype == jnp.float32 for leaf in last)
    with jax.enable_x64(True):
        h, last = run(x.astype(np.float64), recurrent.astype(np.float64))
        assert h.dtype == np.float64 and all(leaf.dtype == np.float64 for leaf in last)
        np.testing.assert_allclose(h, loop(x, recurrent)[0], atol=1e-14)


CASE = dict(zip(("x", "recurrent"), inputs(2, 5), strict=True))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": CASE["x"][:, :, :3]}, r"x must be \(b t 4 h n\), got shape \(2, 5, 3, 2, 3\)"),
        ({"x": CASE["x"][:, :0]}, r"needs at least one step, got t = 0 in x of shape"),
        (
            {"recurrent": CASE["recurrent"][:, :1]},
            r"recurrent must be \(4 h n n\) = \(4, 2, 3, 3\), got \(4, 1, 3, 3\)",
        ),
        (
            {"state": SLSTMState.empty(3, 2, 3)},
            r"state.hidden must be \(b h n\) = \(2, 2, 3\), got \(3, 2, 3\)",
        ),
        ({"x": CASE["x"].astype(np.int32)}, r"x must be real floats, got int32"),
        (
            {"reset": np.zeros((2, 5), np.int32)},
            r"reset must be bool \(b t\) = \(2, 5\), got int32 \(2, 5\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    with pytest.raises(ValueError, match=f"^slstm_scan: {message}"):
        slstm_scan(**(CASE | changed))
