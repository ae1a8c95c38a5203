"""What the laws do not say of `mlstm_scan`: numbers by hand, gates of any size, its doors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.time import MLSTMState, mlstm_scan
from tests import references
from tests.ops.time.test_sharded import mesh

METHODS = ("sequential", "chunkwise")
methods = pytest.mark.parametrize("method", METHODS)
run = jax.jit(mlstm_scan, static_argnames=("chunk", "eps", "method", "axis"))
# Ten times the largest gap between the loop in float32 and in float64, 5e-7 of numbers around 1.
TOLERANCE = 5e-6


def inputs(batch=2, time=9, heads=2, keys=3, values=4):
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(size=(batch, time, heads, width)).astype(np.float32)
        for width in (keys, keys, values)
    )
    i, f = rng.normal(size=(2, batch, time, heads)).astype(np.float32)
    return [q, k, v, i, -np.log1p(np.exp(-f))]


def loop(case, eps=1e-6):
    q, k, v, *gates = (z.astype(np.float64) for z in case)
    batch, time, heads, keys = q.shape
    start = np.zeros((batch, heads, keys, v.shape[3])), np.zeros((batch, heads, keys))
    nothing, never = np.zeros((batch, heads)), np.zeros((batch, time), bool)
    return references.mlstm(q, k, v, *gates, *start, nothing, never, eps)[0]


@methods
def test_three_steps_by_hand(method):
    """One key of 1: a weighted mean of the values, until the weights together are less than 1."""
    ones = np.ones((1, 3, 1, 1), np.float32)
    v = np.array([1, 4, 0], np.float32).reshape(1, 3, 1, 1)
    i = np.log(np.array([1, 2, 0.125], np.float32)).reshape(1, 3, 1)
    f = np.log(np.array([0.5, 0.5, 0.25], np.float32)).reshape(1, 3, 1)
    y, last = run(ones, ones, v, i, f, method=method)
    np.testing.assert_allclose(y.ravel(), [1, (0.5 + 8) / 2.5, (8.5 / 4) / 1], rtol=3e-6)
    weight = np.exp(last.maximum.item())
    assert last.normaliser.item() * weight == pytest.approx(2.5 / 4 + 0.125, rel=1e-6)
    assert last.memory.item() * weight == pytest.approx(8.5 / 4, rel=1e-6)


@methods
@pytest.mark.parametrize("shift", [-200.0, 0.0, 200.0])
def test_gates_of_any_size_equal_the_loop(method, shift):
    """e^200 does not exist in float32. Weights that vanish leave 1 as the denominator."""
    case = inputs()
    case[:2] = np.abs(case[:2])  # the denominator does not cancel, which would amplify errors
    case[3] = case[3] + np.float32(shift)
    y, last = run(*case, method=method)
    # At 200 the sum of a gate and the maximum is rounded by 1e-5.
    np.testing.assert_allclose(y, loop(case), atol=TOLERANCE if shift == 0 else 1e-4)
    for leaf in last:
        assert np.all(np.isfinite(leaf))


@methods
def test_elements_heads_and_steps_with_gates_of_other_sizes_do_not_talk(method):
    case = inputs(batch=3)
    case[3][1] += 300
    case[3][2] -= 300
    case[4][2] *= 100
    case[3][0, :, 1] += 40
    y, last = run(*case, method=method)
    for leaf in jax.tree.leaves((y, last)):
        assert np.all(np.isfinite(leaf))
    for b in range(3):
        alone, _ = run(*(z[b : b + 1] for z in case), method=method)
        np.testing.assert_array_equal(y[b : b + 1], alone)
    for h in range(2):
        alone, _ = run(*(z[:, :, h : h + 1] for z in case), method=method)
        np.testing.assert_allclose(y[:, :, h : h + 1], alone, atol=TOLERANCE)
    gradient = jax.jit(
        jax.grad(lambda case: jnp.sum(mlstm_scan(*case, method=method)[0] ** 2)),
    )(case)
    for leaf in gradient:
        assert np.all(np.isfinite(leaf))
        assert np.any(leaf[0] != 0) and np.any(leaf[1] != 0)


@methods
def test_a_gate_that_keeps_all_has_its_whole_gradient(method):
    """Where the old maximum stays the decay is exactly 1, and a minimum there would halve this."""
    q, k, v, i, f = inputs(batch=1, time=6, heads=1)
    i[0, 0], i[0, 1:] = 5, -1
    gradient = jax.jit(
        jax.grad(lambda f: jnp.sum(mlstm_scan(q, k, v, i, f, method=method, chunk=4)[0] ** 2))
    )(f)
    want = slopes(lambda f: np.sum(loop([q, k, v, i, f]) ** 2), f)
    np.testing.assert_allclose(gradient, want, atol=1e-5 * np.max(np.abs(want)))


def slopes(loss, x, step=1e-5):
    """The gradient of a loss by finite differences in float64."""
    x = x.astype(np.float64)
    gradient = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        moved = np.zeros_like(x)
        moved[at] = step
        gradient[at] = (loss(x + moved) - loss(x - moved)) / (2 * step)
    return gradient


@pytest.mark.parametrize("with_reset", [False, True])
def test_the_gradient_of_epsilon(with_reset):
    """Epsilon is relative to e^m, so that its share depends on which gate m is made of."""
    case = inputs(time=6, heads=1)
    reset = np.zeros((2, 6), bool)
    reset[0, [0, 3]] = with_reset
    rng = np.random.default_rng(1)
    state = MLSTMState(
        rng.normal(size=(2, 1, 3, 4)).astype(np.float32),
        rng.normal(size=(2, 1, 3)).astype(np.float32),
        np.full((2, 1), 0.5, np.float32),
    )

    def loss(i, f, m):
        start = state._replace(maximum=m)
        return jnp.sum(mlstm_scan(*case[:3], i, f, start, reset=reset, eps=0.3)[0] ** 2)

    def exact(i, f, m):
        wide = (z.astype(np.float64) for z in (*case[:3], i, f, *state[:2], m))
        return np.sum(references.mlstm(*wide, reset, 0.3)[0] ** 2)

    at = (*case[3:], state.maximum)
    for n, gradient in enumerate(jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*at)):
        want = slopes(lambda x, n=n: exact(*at[:n], x, *at[n + 1 :]), at[n])
        np.testing.assert_allclose(gradient, want, atol=1e-5 * np.max(np.abs(want)))


@pytest.mark.parametrize("eps", [0.0, 1e-1])
def test_epsilon_is_in_the_unit_of_what_is_kept(eps):
    case = inputs()
    np.testing.assert_allclose(run(*case, eps=eps)[0], loop(case, eps), atol=TOLERANCE)


def test_a_state_may_be_scaled_in_any_way():
    case = inputs()
    _, state = run(*case)
    scale = np.exp(np.float32(3))
    other = MLSTMState(state[0] * scale, state[1] * scale, state[2] - 3)
    want, _ = run(*case, state, eps=0.0)
    got, _ = run(*case, other, eps=0.0)
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


def test_over_devices():
    case, reset = inputs(time=24), np.random.default_rng(1).random((2, 24)) < 0.1
    _, state = run(*inputs())
    weights = np.random.default_rng(2).normal(size=(2, 24, 2, 4)).astype(np.float32)

    def value_and_gradient(case, state, axis):
        def loss(case, state):
            y, last = mlstm_scan(*case, state, reset=reset, chunk=4, eps=0.3, axis=axis)
            return jnp.sum(y * weights), (y, last)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(case, state)

    both = jax.jit(value_and_gradient, static_argnums=2)
    want = jax.device_get(both(case, state, None))
    with jax.set_mesh(mesh({"data": 2, "seq": 4})):
        got = jax.device_get(both(case, state, "seq"))
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(left, right, atol=TOLERANCE * np.max(np.abs(right)))


def test_dtypes():
    case = [z.astype(jnp.bfloat16) for z in inputs()]
    y, last = jax.eval_shape(mlstm_scan, *case)
    assert y.dtype == jnp.bfloat16 and all(leaf.dtype == jnp.float32 for leaf in last)
    with jax.enable_x64(True):
        case = [z.astype(np.float64) for z in inputs()]
        for method in METHODS:
            y, last = run(*case, method=method)
            assert y.dtype == np.float64 and all(leaf.dtype == np.float64 for leaf in last)
            np.testing.assert_allclose(y, loop(case), atol=1e-13)


CASE = dict(zip(("q", "k", "v", "input_gate", "log_forget"), inputs(2, 3, 2, 4, 5), strict=True))
STATE = MLSTMState.empty(2, 2, 4, 5)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"method": "fast"}, r"method must be one of \('auto', .*got 'fast'"),
        ({"chunk": 0}, r"chunk must be >= 1, got 0"),
        ({"q": CASE["q"][:, :0]}, r"at least one step, got t = 0 in q of shape \(2, 0, 2, 4\)"),
        ({"q": CASE["q"][0]}, r"q must be \(b t h k\) and v \(b t h v\), got \(3, 2, 4\) and"),
        ({"k": CASE["v"]}, r"k must be \(b t h k\) = \(2, 3, 2, 4\), got \(2, 3, 2, 5\)"),
        ({"v": CASE["v"][:1]}, r"v must be \(b t h v\) = \(2, 3, 2, 5\), got \(1, 3, 2, 5\)"),
        (
            {"input_gate": CASE["q"]},
            r"input_gate must be \(b t h\) = \(2, 3, 2\), got \(2, 3, 2, 4\)",
        ),
        ({"log_forget": CASE["log_forget"][:, 1:]}, r"log_forget must be \(b t h\) = \(2, 3, 2\)"),
        ({"q": CASE["q"].astype(np.int32)}, r"q must be real floats, got int32"),
        (
            {"state": STATE._replace(maximum=np.zeros((2, 3), np.float32))},
            r"state.maximum must be \(b h\) = \(2, 2\), got \(2, 3\)",
        ),
        (
            {"reset": np.zeros((2, 3), np.int32)},
            r"reset must be bool \(b t\) = \(2, 3\), got int32 \(2, 3\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        mlstm_scan(**(CASE | changed))
