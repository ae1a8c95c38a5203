"""What the laws do not say of `selective_scan`: its doors, its dtypes, its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.time import selective_scan
from tests import references

METHODS = ("sequential", "chunked")
methods = pytest.mark.parametrize("method", METHODS)

# Ten times the largest gap between the loop in float32 and in float64, 2e-7 of numbers around 1.
TOLERANCE = 2e-6


@functools.partial(jax.jit, static_argnames=("method", "chunk"))
def run(x, dt, a, b, c, state=None, reset=None, **options):
    return selective_scan(x, dt, a, b, c, state, reset=reset, **options)


def inputs(batch=2, time=7, inner=3, size=2, seed=0):
    rng = np.random.default_rng(seed)
    x, b, c = (rng.normal(size=(batch, time, n)) for n in (inner, size, size))
    dt, a = rng.uniform(0.1, 1.0, x.shape), -rng.uniform(0.1, 2.0, (inner, size))
    return [z.astype(np.float32) for z in (x, dt, a, b, c)]


def loop(x, dt, a, b, c, state=None, reset=None):
    state = np.zeros((x.shape[0], *a.shape)) if state is None else state
    reset = np.zeros(x.shape[:2], bool) if reset is None else reset
    wide = (z.astype(np.float64) for z in (x, dt, a, b, c, state))
    return references.selective_scan(*wide, reset)


def test_three_steps_by_hand():
    """Decays of 1/2 and 1/4 a unit of time; the last step is twice as long."""
    x, dt = np.array([[[1.0], [0.0], [1.0]]]), np.array([[[1.0], [1.0], [2.0]]])
    a, ones = -np.log([[2.0, 4.0]]), np.ones((1, 3, 2))
    y, last = run(*(z.astype(np.float32) for z in (x, dt, a, ones, ones)))
    np.testing.assert_allclose(last, [[[2 + 1 / 8, 2 + 1 / 64]]], rtol=1e-6)
    np.testing.assert_allclose(y[0, :, 0], [2, 3 / 4, 4 + 1 / 8 + 1 / 64], rtol=1e-6)


@methods
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_nothing(method, chunk):
    case = inputs()
    state = np.random.default_rng(1).normal(size=(2, 3, 2)).astype(np.float32)
    reset = np.random.default_rng(2).random((2, 7)) < 0.3
    y, last = run(*case, state, reset, method=method, chunk=chunk)
    want, want_last = loop(*case, state, reset)
    np.testing.assert_allclose(y, want, atol=TOLERANCE)
    np.testing.assert_allclose(last, want_last, atol=TOLERANCE)


@methods
def test_vmap_is_a_further_axis(method):
    cases = [inputs(seed=seed) for seed in (0, 1)]
    stacked = (np.stack(leaves) for leaves in zip(*cases, strict=True))
    y, last = jax.jit(jax.vmap(functools.partial(selective_scan, method=method, chunk=4)))(*stacked)
    for i, case in enumerate(cases):
        want, want_last = loop(*case)
        np.testing.assert_allclose(y[i], want, atol=TOLERANCE)
        np.testing.assert_allclose(last[i], want_last, atol=TOLERANCE)


def test_auto_is_one_of_them_and_has_its_gradient():
    case = inputs()

    @functools.partial(jax.jit, static_argnames="method")
    def value_and_gradient(case, method):
        return jax.value_and_grad(
            lambda case: jnp.sum(selective_scan(*case, method=method, chunk=4)[0] ** 2)
        )(case)

    pairs = [jax.tree.leaves(value_and_gradient(case, m)) for m in ("auto", "sequential")]
    for left, right in zip(*pairs, strict=True):  # what runs on CPU; elsewhere it is chunked
        np.testing.assert_array_equal(left, right)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        case = [z.astype(np.float64) for z in inputs()]
        for method in METHODS:
            y, last = jax.jit(functools.partial(selective_scan, method=method))(*case)
            assert y.dtype == last.dtype == np.float64
            np.testing.assert_allclose(y, loop(*case)[0], atol=1e-14)


@methods
def test_bfloat16_runs_in_a_float32_state_and_keeps_its_dtypes(method):
    """1 + 300 * 2^-9 in steps of 2^-9: a bfloat16 state would stay at 1 for ever."""
    x = np.full((1, 301, 1), 2.0**-9, jnp.bfloat16)
    x[0, 0] = 1.0
    ones, a = np.ones((1, 301, 1), jnp.bfloat16), np.zeros((1, 1), jnp.bfloat16)
    y, last = run(x, ones, a, ones, ones, method=method)
    assert y.dtype == jnp.bfloat16 and last.dtype == jnp.float32
    np.testing.assert_array_equal(last, [[[1.0 + 300 * 2.0**-9]]])

    def loss(*case):
        return jnp.sum(selective_scan(*case, method=method)[0].astype(jnp.float32))

    gradients = jax.eval_shape(jax.grad(loss, argnums=range(5)), x, ones, a, ones, ones)
    assert all(gradient.dtype == jnp.bfloat16 for gradient in gradients)


def test_an_empty_batch():
    y, last = run(*inputs(batch=0))
    assert y.shape == (0, 7, 3) and last.shape == (0, 3, 2)


def temporary_bytes(scan, time):
    """Scratch memory of the gradient to all inputs, as the compiler reports it."""
    shapes = [jax.ShapeDtypeStruct(z.shape, z.dtype) for z in inputs(2, time, 64, 16)]
    gradient = jax.grad(lambda *case: jnp.sum(scan(*case)[0] ** 2), argnums=range(5))
    return jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def naive(x, dt, a, b, c):
    """The same on the whole expanded state (b t e n), differentiated by JAX."""
    decay = jnp.exp(dt[..., None] * a[None, None])
    entering = (dt * x)[..., None] * b[:, :, None]

    def step(h, now):
        h = now[0] * h + now[1]
        return h, h

    time_major = tuple(jnp.swapaxes(z, 0, 1) for z in (decay, entering))
    last, h = jax.lax.scan(step, jnp.zeros_like(decay[:, 0]), time_major)
    return jnp.einsum("tben,btn->bte", h, c), last


@methods
def test_the_gradient_never_holds_the_expanded_state(method):
    """At t = 1024 the expanded state alone is 8 MiB, and the naive gradient needs several."""
    expanded = 2 * 1024 * 64 * 16 * 4
    ours = [
        temporary_bytes(functools.partial(selective_scan, method=method), t) for t in (512, 1024)
    ]
    assert temporary_bytes(naive, 1024) > 3 * expanded
    # In float32, arrays like x are 1/16 of the expanded state; borders are 1/32 of it; of what a
    # chunk holds there are a dozen arrays at a time at the most.
    assert ours[1] < 0.75 * expanded
    # What grows with time is a few arrays like x, dt, y and the borders, not the expanded state.
    assert ours[1] - ours[0] < 0.5 * expanded / 2


CASE = dict(zip(("x", "dt", "a", "b", "c"), inputs(2, 3, 4, 5), strict=True))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"method": "fast"}, r"method must be one of \('auto', .*got 'fast'"),
        ({"chunk": 0}, r"chunk must be >= 1, got 0"),
        ({"x": CASE["x"][:, :0]}, r"at least one step, got t = 0 in x of shape \(2, 0, 4\)"),
        ({"x": CASE["x"][0]}, r"x must be \(b t e\), got shape \(3, 4\)"),
        ({"dt": CASE["dt"][:, :2]}, r"dt must be \(b t e\) = \(2, 3, 4\), got \(2, 2, 4\)"),
        ({"a": CASE["a"].T}, r"a must be \(e n\) with e = 4 as in x, got \(5, 4\)"),
        ({"b": CASE["c"][..., :2]}, r"b must be \(b t n\) = \(2, 3, 5\), got \(2, 3, 2\)"),
        ({"c": CASE["c"][:1]}, r"c must be \(b t n\) = \(2, 3, 5\), got \(1, 3, 5\)"),
        (
            {"state": np.zeros((3, 4, 5), np.float32)},
            r"state must be \(b e n\) = \(2, 4, 5\), got \(3, 4, 5\)",
        ),
        ({"dt": CASE["dt"] - 10}, r"dt must be >= 0, got -\d"),
        ({"x": CASE["x"].astype(np.int32)}, r"x must be real floats, got int32"),
        ({"b": CASE["b"].astype(np.complex64)}, r"b must be real floats, got complex64"),
        (
            {"reset": np.zeros((2, 4), bool)},
            r"reset must be bool \(b t\) = \(2, 3\), got bool \(2, 4\)",
        ),
        (
            {"reset": np.zeros((2, 3), np.int32)},
            r"reset must be bool \(b t\) = \(2, 3\), got int32 \(2, 3\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    with pytest.raises(ValueError, match=f"^selective_scan: .*{message}"):
        selective_scan(**(CASE | changed))
