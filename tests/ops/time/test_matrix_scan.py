"""What the laws do not say of `matrix_scan`: its doors, its dtypes, its digits, its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.time import matrix_scan
from tests import references

METHODS = ("sequential", "chunkwise")
methods = pytest.mark.parametrize("method", METHODS)
rules = pytest.mark.parametrize("rule", ["gated", "delta"])
decays = pytest.mark.parametrize("decay", [None, "head", "key"])

# Ten times the largest gap between the loop in float32 and in float64, 3e-7 of numbers around 1.
TOLERANCE = 3e-6


@functools.partial(jax.jit, static_argnames=("rule", "normalise", "chunk", "method"))
def run(case, state=None, reset=None, **options):
    return matrix_scan(**case, state=state, reset=reset, **options)


def inputs(rule="gated", decay="head", batch=2, time=7, heads=2, keys=4, values=3, seed=0):
    rng = np.random.default_rng(seed)
    shape = (batch, time, heads)
    q, k, v = (rng.normal(size=(*shape, n)) for n in (keys, keys, values))
    case = {"q": q, "k": k / np.linalg.norm(k, axis=-1, keepdims=True), "v": v}
    if decay is not None:
        case["log_decay"] = -np.abs(rng.normal(size=shape if decay == "head" else q.shape))
    if rule == "delta":
        case["beta"] = rng.uniform(0, 1, shape)
    return {name: x.astype(np.float32) for name, x in case.items()}


def loop(case, state=None, reset=None):
    q, k, v = (case[name].astype(np.float64) for name in "qkv")
    batch, time, heads, keys = q.shape
    g = case.get("log_decay", np.zeros((batch, time, heads))).astype(np.float64)
    beta = case.get("beta")
    beta = None if beta is None else beta.astype(np.float64)
    state = np.zeros((batch, heads, keys, v.shape[-1])) if state is None else state
    reset = np.zeros((batch, time), bool) if reset is None else reset
    g = g.reshape(batch, time, heads, -1)
    return references.matrix_scan(q, k, v, g, beta, state.astype(np.float64), reset)


@methods
def test_three_steps_by_hand(method):
    """One key is written twice: the gated rule adds, the delta rule replaces half of it."""
    k = np.array([[1, 0], [0, 1], [1, 0]], np.float32)[None, :, None]
    v = np.array([8, 3, 2], np.float32)[None, :, None, None]
    q, g = np.ones_like(k), np.log(np.full((1, 3, 1), 0.5, np.float32))
    y, last = run({"q": q, "k": k, "v": v, "log_decay": g}, method=method)
    np.testing.assert_allclose(y[0, :, 0, 0], [8, 4 + 3, 2 + 1.5 + 2], rtol=1e-6)
    np.testing.assert_allclose(last[0, 0, :, 0], [4, 1.5], rtol=1e-6)
    half = np.full((1, 3, 1), 0.5, np.float32)
    case = {"q": q, "k": k, "v": v, "beta": half}
    y, last = run(case, rule="delta", method=method)
    np.testing.assert_allclose(y[0, :, 0, 0], [4, 4 + 1.5, 3 + 1.5], rtol=1e-6)
    np.testing.assert_allclose(last[0, 0, :, 0], [3, 1.5], rtol=1e-6)


@rules
@decays
@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_chunks_change_nothing(rule, decay, chunk):
    case = inputs(rule, decay, time=21)
    state = np.random.default_rng(1).normal(size=(2, 2, 4, 3)).astype(np.float32)
    reset = np.random.default_rng(2).random((2, 21)) < 0.2
    y, last = run(case, state, reset, rule=rule, chunk=chunk, method="chunkwise")
    want, want_last = loop(case, state, reset)
    np.testing.assert_allclose(y, want, atol=TOLERANCE)
    np.testing.assert_allclose(last, want_last, atol=TOLERANCE)


@rules
@decays
@methods
def test_heads_may_share_their_keys(rule, decay, method):
    """It is the same as to repeat them, gradients included."""
    case = inputs(rule, decay, time=11, heads=6)
    case |= {name: case[name][:, :, :2] for name in ("q", "k")}
    case["state"] = np.random.default_rng(1).normal(size=(2, 6, 4, 3)).astype(np.float32)
    reset = np.random.default_rng(2).random((2, 11)) < 0.2

    def loss(case):
        y, last = matrix_scan(**case, rule=rule, reset=reset, method=method, chunk=4)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(last))

    def loss_of_repeated(case):
        return loss(case | {name: jnp.repeat(case[name], 3, axis=2) for name in ("q", "k")})

    got, want = jax.jit(
        lambda case: [jax.value_and_grad(f)(case) for f in (loss, loss_of_repeated)]
    )(case)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-5), got, want)


@rules
@methods
def test_vmap_is_a_further_axis(rule, method):
    cases = [inputs(rule, seed=seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *cases)
    scan = functools.partial(matrix_scan, rule=rule, method=method, chunk=4)
    y, last = jax.jit(jax.vmap(lambda case: scan(**case)))(stacked)
    for i, case in enumerate(cases):
        want, want_last = loop(case)
        np.testing.assert_allclose(y[i], want, atol=TOLERANCE)
        np.testing.assert_allclose(last[i], want_last, atol=TOLERANCE)


@rules
@decays
def test_the_gradient_of_a_gradient_is_that_of_the_loop(rule, decay):
    """The written gradient can itself be differentiated."""
    case = inputs(rule, decay, batch=1, time=6, heads=1)
    direction = inputs(rule, decay, batch=1, time=6, heads=1, seed=1)

    @functools.partial(jax.jit, static_argnames="method")
    def second(case, method):
        def loss(case):
            y, last = matrix_scan(**case, rule=rule, method=method, chunk=4)
            return jnp.sum(y**2) + jnp.sum(last**2)

        def slope(case):
            gradient = jax.grad(loss)(case)
            return sum(jnp.vdot(gradient[name], direction[name]) for name in case)

        return jax.grad(slope)(case)

    got, want = second(case, "chunkwise"), second(case, "sequential")
    for name in case:
        scale = np.max(np.abs(want[name]))
        np.testing.assert_allclose(got[name], want[name], atol=1e-5 * scale, err_msg=name)


def test_auto_takes_a_single_step_as_it_is():
    for time, method in ((1, "sequential"), (2, "chunkwise"), (7, "chunkwise")):
        case = inputs(time=time)
        for got, want in zip(run(case), run(case, method=method), strict=True):
            np.testing.assert_array_equal(got, want)


def test_without_beta_the_delta_rule_replaces_all():
    case = inputs()
    ones = np.ones(case["q"].shape[:3], np.float32)
    got, want = run(case, rule="delta"), run(case | {"beta": ones}, rule="delta")
    jax.tree.map(np.testing.assert_array_equal, got, want)


@decays
def test_strong_and_weak_decays_keep_their_digits(decay):
    """Between decays of 1e-4000 lie stretches of weak ones, whose sum must not be rounded to that
    of the strong ones. A difference of plain sums is wrong by 1e-3 here.
    """
    case = inputs("gated", decay, time=64)
    if decay is not None:
        g = case["log_decay"]
        g *= np.where(np.random.default_rng(3).random(g.shape) < 0.1, np.float32(1e4), 1e-4)
    y, last = run(case, method="chunkwise", chunk=64)
    want, want_last = loop(case)
    np.testing.assert_allclose(y, want, atol=2e-6 * np.max(np.abs(want)))
    np.testing.assert_allclose(last, want_last, atol=2e-6 * np.max(np.abs(want_last)))


def test_equal_keys_do_not_lose_digits():
    """The system of the delta rule is then full: its inverse has entries of 1, its powers 1e18."""
    case = inputs("delta", None, time=64)
    case["k"][...] = case["k"][:, :1]
    case["beta"][...] = 1
    y, _ = run(case, rule="delta", method="chunkwise", chunk=64)
    want, _ = loop(case)
    np.testing.assert_allclose(y, want, atol=1e-6 * np.max(np.abs(want)))


def test_infinite_values_after_a_step_change_nothing_before_it():
    """In another chunk, that is; inside of one, zero times infinity is not a number."""
    case = inputs(time=8)
    y, _ = run(case, method="chunkwise", chunk=4)
    case["v"][:, 4:] = np.inf
    other, _ = run(case, method="chunkwise", chunk=4)
    np.testing.assert_array_equal(other[:, :4], y[:, :4])


@methods
@pytest.mark.parametrize("decay", ["head", "key"])
def test_a_positive_decay_that_is_not_known_makes_nan_from_there_on(method, decay):
    case = inputs("gated", decay, time=12)
    case["log_decay"][(0, 6, 0) if decay == "head" else (0, 6, 0, 0)] = 1e-3
    y, last = run(case, method=method, chunk=8)
    for others in (y[:, :6], y[1], y[:, :, 1]):
        assert np.all(np.isfinite(others))
    assert np.all(np.isnan(y[0, 6:, 0]))
    rows = np.isnan(last[0, 0]).all(axis=-1)
    np.testing.assert_array_equal(rows, np.arange(len(rows)) == 0 if decay == "key" else True)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        for rule in ("gated", "delta"):
            case = {name: x.astype(np.float64) for name, x in inputs(rule, "key").items()}
            reset = np.arange(14).reshape(2, 7) % 5 == 3
            for method in METHODS:
                y, last = run(case, None, reset, rule=rule, method=method, chunk=4)
                assert y.dtype == last.dtype == np.float64
                np.testing.assert_allclose(y, loop(case, None, reset)[0], atol=1e-14)


@methods
def test_bfloat16_runs_in_a_float32_state_and_keeps_its_dtypes(method):
    """1 + 300 * 2^-9 in steps of 2^-9: a bfloat16 state would stay at 1 for ever."""
    ones = np.ones((1, 301, 1, 1), jnp.bfloat16)
    v = np.full_like(ones, 2.0**-9)
    v[0, 0] = 1.0
    case = {"q": ones, "k": ones, "v": v, "log_decay": 0 * ones[..., 0]}
    y, last = run(case, method=method)
    assert y.dtype == jnp.bfloat16 and last.dtype == jnp.float32
    np.testing.assert_array_equal(last, [[[[1.0 + 300 * 2.0**-9]]]])

    def loss(case):
        return jnp.sum(matrix_scan(**case, method=method)[0].astype(jnp.float32))

    gradients = jax.eval_shape(jax.grad(loss), case)
    assert all(gradient.dtype == jnp.bfloat16 for gradient in gradients.values())


@rules
def test_an_empty_batch(rule):
    y, last = run(inputs(rule, "key", batch=0), rule=rule)
    assert y.shape == (0, 7, 2, 3) and last.shape == (0, 2, 4, 3)


def temporary_bytes(rule, decay, method, time):
    """Scratch memory of the gradient to all inputs, as the compiler reports it."""
    case = inputs(rule, decay, 1, time, 1, 64, 64)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in case.items()}

    def loss(case):
        return jnp.sum(matrix_scan(**case, rule=rule, method=method, chunk=32)[0] ** 2)

    return jax.jit(jax.grad(loss)).lower(shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "rule, decay, method",
    [
        ("gated", "head", "chunkwise"),
        ("gated", "key", "chunkwise"),
        ("delta", "key", "chunkwise"),
        ("delta", "head", "sequential"),
    ],
)
def test_the_gradient_never_holds_the_states(rule, decay, method):
    """At t = 2048 all states alone are 32 MiB, and a plain gradient needs several times that."""
    states = 2048 * 64 * 64 * 4
    half, whole = (temporary_bytes(rule, decay, method, time) for time in (1024, 2048))
    # States at borders are 1/32 of all; what a chunk needs is a few dozen arrays like k, 1/64 each.
    assert whole < 0.6 * states
    assert whole < 2.1 * half


CASE = inputs("delta", "key", 2, 3, 5, 4, 6)
GATED = {"beta": None, "rule": "gated"}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"method": "fast"}, r"method must be one of \('auto', .*got 'fast'"),
        ({"rule": "hebb"}, r"rule must be one of \('gated', 'delta'\), got 'hebb'"),
        ({"chunk": 0}, r"chunk must be >= 1, got 0"),
        ({"rule": "gated"}, r"beta belongs to the delta rule, got rule='gated'"),
        ({"normalise": 1e-6}, r"normalise belongs to the gated rule, got rule='delta'"),
        ({"q": CASE["q"][:, :0]}, r"at least one step, got t = 0 in q of shape \(2, 0, 5, 4\)"),
        ({"q": CASE["q"][0]}, r"q must be \(b t g k\), got shape \(3, 5, 4\)"),
        ({"k": CASE["v"]}, r"k must be \(b t g k\) = \(2, 3, 5, 4\) as q, got \(2, 3, 5, 6\)"),
        ({"v": CASE["v"][:, :2]}, r"v must be \(b t h v\) with .* \(2, 3\).*got \(2, 2, 5, 6\)"),
        ({"v": CASE["v"][:, :, :4]}, r"v must be .* a multiple of its 5 heads, got \(2, 3, 4, 6\)"),
        (
            {"log_decay": CASE["v"]},
            r"log_decay must be \(b t h\) = \(2, 3, 5\) or \(b t h k\) = \(2, 3, 5, 4\),"
            r" got \(2, 3, 5, 6\)",
        ),
        ({"beta": CASE["beta"][..., :1]}, r"beta must be \(b t h\) = \(2, 3, 5\), got \(2, 3, 1\)"),
        (
            {"state": np.zeros((2, 5, 6, 4), np.float32)},
            r"state must be \(b h k v\) = \(2, 5, 4, 6\), got \(2, 5, 6, 4\)",
        ),
        (
            GATED | {"normalise": 0.1, "state": np.zeros((2, 5, 4, 6), np.float32)},
            r"state must be \(b h k v\+1\) = \(2, 5, 4, 7\), got \(2, 5, 4, 6\)",
        ),
        ({"log_decay": -CASE["log_decay"]}, r"log_decay must be <= 0, .*, got \d"),
        ({"q": CASE["q"].astype(np.int32)}, r"q must be real floats, got int32"),
        ({"k": CASE["k"].astype(np.complex64)}, r"k must be real floats, got complex64"),
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
    with pytest.raises(ValueError, match=f"^matrix_scan: .*{message}"):
        matrix_scan(**(CASE | {"rule": "delta"} | changed))
