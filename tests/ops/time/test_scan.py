"""What the laws do not say of `linear_scan`: its doors, its dtypes, and other transforms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.time import linear_scan
from tests import references

METHODS = ("sequential", "associative", "chunked")
methods = pytest.mark.parametrize("method", METHODS)

# Ten times the largest gap between the loop in float32 and in float64, 1e-7 of numbers around 1.
TOLERANCE = 1e-6


@functools.partial(jax.jit, static_argnames=("method", "reverse"))
def run(a, b, h0=None, reset=None, *, method="auto", reverse=False):
    return linear_scan(a, b, h0, reset=reset, method=method, reverse=reverse)


def inputs(shape, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.uniform(0.5, 1.0, shape), rng.normal(size=shape)
    return a.astype(np.float32), b.astype(np.float32)


def loop(a, b, h0=None, reset=None):
    a = np.broadcast_to(a, b.shape).astype(np.float64)
    h0 = np.zeros(b.shape[:1] + b.shape[2:]) if h0 is None else h0
    reset = np.zeros(b.shape[:2], bool) if reset is None else reset
    return references.linear_scan(a, b.astype(np.float64), h0, reset)


def test_four_steps_by_hand():
    a = np.array([[0.5, 0.5, 2.0, 1.0]], np.float32)
    b = np.array([[1.0, 0.0, 1.0, -1.0]], np.float32)
    h, last = run(a, b, np.array([4.0], np.float32))
    np.testing.assert_array_equal(h, [[3.0, 1.5, 4.0, 3.0]])
    np.testing.assert_array_equal(last, [3.0])
    h, last = run(a, b, np.array([4.0], np.float32), reverse=True)
    np.testing.assert_array_equal(h, [[2.75, 3.5, 7.0, 3.0]])
    np.testing.assert_array_equal(last, [2.75])
    reset = np.array([[False, False, True, False]])
    np.testing.assert_array_equal(run(a, b, None, reset)[0], [[1.0, 0.5, 1.0, 0.0]])
    np.testing.assert_array_equal(run(a, b, None, reset, reverse=True)[0], [[1.25, 0.5, 1.0, -1.0]])


@methods
@pytest.mark.parametrize("trailing", [(), (2, 1, 3)])
def test_any_trailing_shape(method, trailing):
    a, b = inputs((2, 5, *trailing))
    h, last = run(a, b, method=method)
    want_h, want_last = loop(a, b)
    np.testing.assert_allclose(h, want_h, atol=TOLERANCE)
    np.testing.assert_allclose(last, want_last, atol=TOLERANCE)


@methods
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 1), (1, 1, 3)])
def test_a_is_broadcast_and_its_gradient_summed(method, shape):
    _, b = inputs((2, 5, 3))
    a, _ = inputs(shape)

    @jax.jit
    def gradients(a, wide):
        def loss(a):
            return jnp.sum(linear_scan(a, b, method=method)[0] ** 2)

        return linear_scan(a, b, method=method)[0], jax.grad(loss)(a), jax.grad(loss)(wide)

    h, narrow, full = gradients(a, np.broadcast_to(a, b.shape))
    np.testing.assert_allclose(h, loop(a, b)[0], atol=TOLERANCE)
    axes = tuple(i for i, size in enumerate(shape) if size == 1)
    # Sums of up to 30 numbers around 10.
    np.testing.assert_allclose(narrow, np.sum(full, axis=axes, keepdims=True), rtol=1e-5)


@methods
@pytest.mark.parametrize("reverse", [False, True])
def test_initial_state_and_resets_together(method, reverse):
    a, b = inputs((3, 9, 2))
    h0 = inputs((3, 2))[1]
    reset = np.random.default_rng(1).random((3, 9)) < 0.3
    order = np.s_[:, ::-1] if reverse else np.s_[:]
    want_h, want_last = loop(a[order], b[order], h0, reset[order])
    h, last = run(a, b, h0, reset, method=method, reverse=reverse)
    np.testing.assert_allclose(h, want_h[order], atol=TOLERANCE)
    np.testing.assert_allclose(last, want_last, atol=TOLERANCE)


@methods
def test_vmap_is_a_further_axis(method):
    a, b = inputs((2, 3, 5, 4))
    h0 = inputs((2, 3, 4))[1]
    h, last = jax.jit(jax.vmap(functools.partial(linear_scan, method=method)))(a, b, h0)
    for i in range(2):
        want_h, want_last = loop(a[i], b[i], h0[i])
        np.testing.assert_allclose(h[i], want_h, atol=TOLERANCE)
        np.testing.assert_allclose(last[i], want_last, atol=TOLERANCE)


@methods
@pytest.mark.parametrize("reverse", [False, True])
def test_gradient_of_gradient(method, reverse):
    """A Hessian-vector product against finite differences of the reverse loop in float64."""
    a, b = inputs((2, 5, 2))
    h0, direction = inputs((2, 2))[1], inputs(a.shape, seed=3)

    def energy(a, b):
        h, last = linear_scan(a, b, h0.astype(a.dtype), method=method, reverse=reverse)
        return jnp.sum(h**3) + jnp.sum(last**2)

    @jax.jit
    def product(a, b):
        def slope(a, b):
            da, db = jax.grad(energy, argnums=(0, 1))(a, b)
            return jnp.sum(da * direction[0]) + jnp.sum(db * direction[1])

        return jax.grad(slope, argnums=(0, 1))(a, b)

    def gradient(a, b):
        """Of the energy, in float64, by the reverse loop."""
        order = np.s_[:, ::-1] if reverse else np.s_[:]
        a, b = a[order], b[order]
        h, last = references.linear_scan(a, b, h0.astype(np.float64), np.zeros((2, 5), bool))
        db, after = np.zeros_like(b), 2 * last
        for t in reversed(range(5)):
            db[:, t] = after = 3 * h[:, t] ** 2 + after
            after = a[:, t] * after
        da = db * np.concatenate([h0[:, None], h[:, :-1]], axis=1)
        return da[order], db[order]

    a64, b64, step = a.astype(np.float64), b.astype(np.float64), 1e-5
    ends = [gradient(a64 + s * step * direction[0], b64 + s * step * direction[1]) for s in (1, -1)]
    for got, up, down in zip(product(a, b), *ends, strict=True):
        want = (up - down) / (2 * step)
        # Ten times the largest relative gap measured, 3e-7.
        np.testing.assert_allclose(got, want, atol=3e-6 * np.max(np.abs(want)))


def test_auto_is_one_of_them_and_has_its_gradient():
    a, b = inputs((2, 5, 3))

    @functools.partial(jax.jit, static_argnames="method")
    def value_and_gradient(a, b, method):
        def loss(a, b):
            return jnp.sum(linear_scan(a, b, method=method)[0] ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1))(a, b)

    pairs = [jax.tree.leaves(value_and_gradient(a, b, m)) for m in ("auto", "sequential")]
    for left, right in zip(*pairs, strict=True):  # what runs on CPU; elsewhere it is chunked
        np.testing.assert_array_equal(left, right)


@methods
def test_an_empty_batch(method):
    h, last = run(np.zeros((0, 4, 2), np.float32), np.zeros((0, 4, 2), np.float32), method=method)
    assert h.shape == (0, 4, 2)
    assert last.shape == (0, 2)


@methods
def test_bfloat16_runs_in_a_float32_state(method):
    """1 + 300 * 2^-9 in steps of 2^-9: a bfloat16 state would stay at 1 for ever."""
    b = np.full((1, 301), 2.0**-9, jnp.bfloat16)
    b[0, 0] = 1.0
    h, last = run(np.ones_like(b), b, method=method)
    assert h.dtype == jnp.bfloat16
    assert last.dtype == jnp.float32
    np.testing.assert_array_equal(last, [1.0 + 300 * 2.0**-9])
    np.testing.assert_array_equal(h[:, -1], last.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "a, b, h, state",
    [
        ("float32", "float32", "float32", "float32"),
        ("bfloat16", "float32", "float32", "float32"),
        ("float32", "bfloat16", "float32", "float32"),
        ("float16", "float16", "float16", "float32"),
        ("complex64", "float32", "complex64", "complex64"),
        ("float32", "complex64", "complex64", "complex64"),
        ("bfloat16", "complex64", "complex64", "complex64"),
        ("int32", "float32", "float32", "float32"),
    ],
)
def test_dtypes(a, b, h, state):
    shapes = (jax.ShapeDtypeStruct((2, 3, 4), jnp.dtype(dtype)) for dtype in (a, b))
    got_h, got_state = jax.eval_shape(linear_scan, *shapes)
    assert (got_h.dtype, got_state.dtype) == (h, state)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        a, b = (x.astype(np.float64) for x in inputs((2, 5, 3)))
        for method in METHODS:
            h, last = jax.jit(functools.partial(linear_scan, method=method))(a, b)
            assert h.dtype == last.dtype == np.float64
            np.testing.assert_allclose(h, loop(a, b)[0], atol=1e-15)


@methods
def test_gradients_have_the_dtypes_of_their_inputs(method):
    a, b = (x.astype(jnp.bfloat16) for x in inputs((2, 5, 3)))
    h0 = np.zeros((2, 3), np.float32)

    def loss(*args):
        h, last = linear_scan(*args, method=method)
        return jnp.sum(h.astype(jnp.float32)) + jnp.sum(last)

    gradients = jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2)), a, b, h0)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]


ONES = np.ones((2, 3, 4), np.float32)


@pytest.mark.parametrize(
    "a, b, options, message",
    [
        (ONES, ONES, {"method": "fast"}, r"method must be one of \('auto', .*got 'fast'"),
        (ONES, ONES[:, :0], {}, r"at least one step, got t = 0 in b of shape \(2, 0, 4\)"),
        (ONES[0, 0], ONES[0, 0], {}, r"b must be \(b t \.\.\.\), got shape \(4,\)"),
        (ONES[:, :2], ONES, {}, r"broadcast to b \(b t \.\.\.\), got \(2, 2, 4\) and \(2, 3, 4\)"),
        (ONES, ONES, {"h0": ONES}, r"h0 must be \(b \.\.\.\) = \(2, 4\), got \(2, 3, 4\)"),
        (
            ONES,
            ONES,
            {"reset": np.zeros((2, 3), np.int32)},
            r"reset must be bool \(b t\) = \(2, 3\), got int32 \(2, 3\)",
        ),
        (
            ONES,
            ONES,
            {"reset": np.zeros((2, 4), bool)},
            r"reset must be bool \(b t\) = \(2, 3\), got bool \(2, 4\)",
        ),
        (
            ONES.astype(np.int32),
            ONES.astype(np.int32),
            {},
            r"a and b must be float or complex, got int32 and int32",
        ),
    ],
)
def test_what_does_not_fit_is_named(a, b, options, message):
    with pytest.raises(ValueError, match=f"^linear_scan: .*{message}"):
        linear_scan(a, b, **options)
