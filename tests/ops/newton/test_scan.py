"""What the laws do not say of `newton_scan`: how it ends, what it refuses, and its gradients where
the iteration approximates."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.cells import CellConfig
from jaxrec.layers.pararnn import ParaRNNConfig
from jaxrec.layers.scan import Solver
from jaxrec.ops.newton import newton_scan

BATCH, TIME, WIDTH = 2, 24, 4
# Ten times the gap between the loops in float32 and in float64, 1e-7 of numbers around 1.
TOLERANCE = 1e-6


def dense(params, h, x):
    return jnp.tanh(x + h @ params)


def diagonal(params, h, x):
    return jnp.tanh(x + h * jnp.diagonal(params)[None])


def pairs(params, h, x):
    """The first half of the state is c, which the second reads and feeds."""
    c, h = jnp.split(h, 2, axis=-1)
    half = c.shape[-1]
    c = 0.7 * c + jnp.tanh(x[..., :half] + h * params[:1, :half])
    return jnp.concatenate([c, jnp.tanh(c + x[..., half:])], axis=-1)


CELLS = {"dense": dense, "diagonal": diagonal, "block": pairs}


def inputs(gain=0.5, seed=0, time=TIME):
    rng = np.random.default_rng(seed)
    params = gain * rng.normal(size=(WIDTH, WIDTH))
    x, h0 = rng.normal(size=(BATCH, time, WIDTH)), rng.normal(size=(BATCH, WIDTH))
    return tuple(z.astype(np.float32) for z in (params, x, h0))


@functools.partial(jax.jit, static_argnames=("step", "jacobian", "method", "options"))
def run(step, params, x, h0, jacobian=None, method="newton", options=(), **arrays):
    return newton_scan(
        step, params, x, h0, jacobian=jacobian, method=method, **dict(options), **arrays
    )


def loop(step, params, x, h0):
    return run(step, params, x, h0, method="sequential")[0]


@pytest.mark.parametrize("kind", CELLS)
def test_few_iterations_give_the_loop(kind):
    args = inputs()
    h, info = run(CELLS[kind], *args)
    np.testing.assert_allclose(h, loop(CELLS[kind], *args), atol=TOLERANCE)
    assert 2 <= info.iterations <= 7
    assert info.converged
    assert info.fallbacks == 0
    assert info.residual <= 1e-6


def test_four_steps_by_hand():
    """A linear cell is solved by one increment, from f(0, x) or anywhere."""
    x = np.array([[[1.0], [0.0], [0.0], [2.0]]], np.float32)
    h0 = np.array([[4.0]], np.float32)
    step = lambda params, h, x: 0.5 * h + x  # noqa: E731
    h, info = newton_scan(step, (), x, h0, method="newton")
    np.testing.assert_array_equal(h[0, :, 0], [3.0, 1.5, 0.75, 2.375])
    assert (int(info.iterations), bool(info.converged)) == (1, True)
    reset = np.array([[False, False, True, False]])
    h, _ = newton_scan(step, (), x, h0, method="newton", reset=reset)
    np.testing.assert_array_equal(h[0, :, 0], [3.0, 1.5, 0.0, 2.0])


def test_a_guess_that_is_the_solution_needs_no_iteration():
    args = inputs()
    h = loop(dense, *args)
    again, info = run(dense, *args, guess=h)
    np.testing.assert_array_equal(again, h)
    assert info.iterations == 0


@pytest.mark.parametrize("window", [1, 5, 8, 24, 100])
def test_windows_change_nothing(window):
    args = inputs()
    h, info = run(dense, *args, options=(("window", window),))
    np.testing.assert_allclose(h, loop(dense, *args), atol=TOLERANCE)
    assert info.converged


def test_a_window_begins_at_the_mean_state_of_the_one_before():
    """A state around 2, which is far from zero: all but the first window settle in three."""
    x = 8 + 0.5 * inputs(time=64)[1]
    h0 = np.full((BATCH, WIDTH), 2.0, np.float32)
    cubic = lambda params, h, x: h + 0.1 * (x - h**3)  # noqa: E731
    options = (("window", 16), ("max_iters", 3), ("tol", 1e-6))
    h, info = run(cubic, (), x, h0, options=options)
    np.testing.assert_allclose(h, loop(cubic, (), x, h0), atol=5e-6)
    _, from_zero = run(cubic, (), x, h0, options=options, guess=0.1 * x)
    assert (int(info.fallbacks), int(from_zero.fallbacks)) == (1, 4)


def test_auto_is_sequential_on_cpu():
    args = inputs(time=300)
    h, info = run(dense, *args, method="auto")
    np.testing.assert_array_equal(h, loop(dense, *args))
    assert info.iterations == 0


# Cells that Newton's method does not solve


def test_what_does_not_settle_is_run_sequentially():
    args = inputs(gain=8.0, time=64)
    want = loop(dense, *args)
    h, info = run(dense, *args, options=(("max_iters", 4), ("window", 16)))
    np.testing.assert_allclose(h, want, atol=1e-5)
    assert not info.converged
    assert 1 <= info.fallbacks <= 4
    assert info.residual > 1e-3
    h, info = run(dense, *args, options=(("max_iters", 4), ("safeguard", False)))
    assert not info.converged
    assert np.max(np.abs(h - want)) > 1e-2


def explosive(params, h, x):
    """Finite on its own path, where h stays within 1; elsewhere it overflows."""
    return jnp.tanh(x) * 0.5 + 0.1 * jnp.sin(40 * h) * jnp.exp(8 * h**2 - 8)


def test_never_nan_where_the_loop_is_finite():
    _, x, h0 = inputs(time=40)
    args = (np.zeros((), np.float32), 5 * x, 0 * h0)
    want = loop(explosive, *args)
    assert np.all(np.isfinite(want))
    guess = np.full_like(x, 30.0)
    h, info = run(explosive, *args, guess=guess)
    np.testing.assert_allclose(h, want, atol=TOLERANCE)
    start = explosive(*args[:1], guess, args[1])
    assert not np.all(np.isfinite(start))  # where the iteration begins it overflows
    assert info.iterations >= 1
    assert not np.isnan(info.residual)


def test_gradients_are_never_nan_where_the_loop_is_finite():
    """They are taken at the solution, wherever the iteration has been."""
    _, x, h0 = inputs(time=40)
    args = (np.full((), 0.1, np.float32), 5 * x, 0 * h0)
    step = lambda params, h, x: explosive(params, h, x) + params * h  # noqa: E731
    weights = inputs(seed=1, time=40)[1]
    want = plain_gradients(step, args, weights)
    got = gradients(step, "newton", args, weights, guess=np.full_like(x, 30.0))
    for left, right in zip(got, want, strict=True):
        assert np.all(np.isfinite(right))
        np.testing.assert_allclose(left, right, atol=1e-5 * np.max(np.abs(right)))


def test_a_cell_that_diverges_is_reported():
    """h' = h^2 + x overflows in the loop too: its values are given, and the flag says no."""
    x = np.full((1, 40, 1), 2.0, np.float32)
    h, info = run(lambda params, h, x: h * h + x, (), x, np.zeros((1, 1), np.float32))
    assert not np.isfinite(h[0, -1, 0])
    assert not info.converged
    assert info.fallbacks == 1


@pytest.mark.parametrize("options", [(("clip", 1.0),), (("relaxation", 0.8),)])
def test_damped_iterations_end_in_the_same_place(options):
    args = inputs()
    h, info = run(dense, *args, options=(*options, ("max_iters", 60)))
    np.testing.assert_allclose(h, loop(dense, *args), atol=3e-6)
    assert info.converged


@pytest.mark.parametrize("method", ["quasi_newton", "elk", "quasi_elk"])
def test_methods_that_approximate_end_in_the_same_place(method):
    args = inputs()
    h, info = run(dense, *args, method=method, options=(("variance", 1e3), ("window", 12)))
    np.testing.assert_allclose(h, loop(dense, *args), atol=3e-6)
    assert info.converged
    assert 4 <= info.iterations <= 40


@pytest.mark.parametrize("method", ["elk", "quasi_elk"])
def test_damped_methods_with_resets(method):
    """A filter knows that zero enters after a reset, whatever came before."""
    args = inputs(time=40)
    reset = np.random.default_rng(3).random((BATCH, 40)) < 0.15
    want = run(dense, *args, method="sequential", reset=reset)[0]
    h, info = run(dense, *args, method=method, reset=reset, options=(("variance", 1e3),))
    np.testing.assert_allclose(h, want, atol=3e-6)
    assert info.converged


def test_the_input_projection_is_not_made_again_in_each_iteration():
    """The loop of a ParaGRU holds no product of matrices, that of a dense GRU does."""
    x = jnp.ones((2, 40, 4))
    layer = ParaRNNConfig(inputs=4, width=4).build(rngs=nnx.Rngs(0))
    layer.solver = Solver(method="newton")
    mixing = CellConfig(kind="gru", inputs=4, width=4).build(rngs=nnx.Rngs(0))
    mixing.solver = Solver(method="newton")
    for cell, products in ((layer, False), (mixing, True)):
        jaxpr = jax.make_jaxpr(lambda x, cell=cell: cell(x, cell.init_state(2))[0])(x)
        loops = list(inside(jaxpr.jaxpr, "while"))
        assert loops
        assert any(list(inside(loop, "dot_general")) for loop in loops) == products
        assert list(inside(jaxpr.jaxpr, "dot_general"))


def inside(jaxpr, name):
    """Equations of this name at any depth; of a `while`, the jaxpr of its body."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation.params["body_jaxpr"].jaxpr if name == "while" else equation
        for nested in jax.extend.core.jaxprs_in_params(equation.params):
            yield from inside(nested, name)


# Gradients


def gradients(step, method, args, weights, **options):
    def loss(params, x, h0):
        return jnp.sum(weights * newton_scan(step, params, x, h0, method=method, **options)[0])

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*args)


def plain_gradients(step, args, weights):
    def loss(params, x, h0):
        def body(h, x):
            h = step(params, h, x)
            return h, h

        _, h = jax.lax.scan(body, h0, jnp.swapaxes(x, 0, 1))
        return jnp.sum(weights * jnp.swapaxes(h, 0, 1))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*args)


@pytest.mark.parametrize("method", ["newton", "quasi_newton", "elk", "sequential", "auto"])
def test_gradients_are_exact_whatever_the_iteration_approximates(method):
    args = inputs()
    weights = inputs(seed=1)[1]
    want = plain_gradients(dense, args, weights)
    for got in (
        gradients(dense, method, args, weights),
        gradients(dense, method, args, weights, window=7),
    ):
        for left, right in zip(got, want, strict=True):
            np.testing.assert_allclose(left, right, atol=2e-6 * np.max(np.abs(right)))


def test_values_that_the_step_closes_over_have_gradients():
    params, x, h0 = inputs()

    def loss(params, method):
        h, _ = newton_scan(lambda _, h, x: dense(params, h, x), (), x, h0, method=method)
        return jnp.sum(h * x)

    got = jax.jit(jax.grad(functools.partial(loss, method="newton")))(params)
    [want, _, _] = plain_gradients(dense, (params, x, h0), x)
    np.testing.assert_allclose(got, want, atol=2e-6 * np.max(np.abs(want)))


@pytest.mark.parametrize("method", ["newton", "sequential"])
def test_second_derivatives(method):
    params, x, h0 = inputs(time=5)

    def plain(params):
        h = [h0]
        for t in range(5):
            h.append(dense(params, h[-1], x[:, t]))
        return jnp.sum(jnp.stack(h[1:]) ** 2)

    def ours(params):
        return jnp.sum(newton_scan(dense, params, x, h0, jacobian="dense", method=method)[0] ** 2)

    def curvature(loss):
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(jax.grad(loss)(params)))))(params)

    want = curvature(plain)
    np.testing.assert_allclose(curvature(ours), want, atol=1e-5 * np.max(np.abs(want)))


def test_forward_mode():
    params, x, h0 = inputs(time=5)

    def states(params, method):
        return newton_scan(dense, params, x, h0, jacobian="dense", method=method)[0]

    direction = np.ones_like(params)
    _, got = jax.jvp(lambda params: states(params, "sequential"), (params,), (direction,))
    step = np.float32(1e-3)
    above, below = (states(params + sign * step * direction, "sequential") for sign in (1, -1))
    np.testing.assert_allclose(got, (above - below) / (2 * step), atol=2e-3)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda params: states(params, "newton"), (params,), (direction,))


def test_integers_and_pytrees_pass_through():
    params, x, h0 = inputs()
    kind = np.arange(TIME, dtype=np.int32)[None].repeat(BATCH, 0) % 3

    def step(params, h, x):
        gain = jnp.where(x["kind"] == 1, params["gain"][params["index"]], 1.0)
        return jnp.tanh(x["input"] + gain[:, None] * (h @ params["matrix"]))

    params = {"matrix": params, "gain": np.array([0.5, 2.0], np.float32), "index": np.int32(1)}

    def loss(gain, method):
        tree = {"input": x, "kind": kind}
        h, _ = newton_scan(step, params | {"gain": gain}, tree, h0, method=method)
        return jnp.sum(h**2)

    got, want = (
        jax.jit(jax.value_and_grad(loss), static_argnums=1)(params["gain"], method)
        for method in ("newton", "sequential")
    )
    assert got[1][0] == 0
    for left, right in zip(got, want, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5)


def test_iterations_stop_where_each_element_has_settled():
    """An element that needs more iterations does not change the others' last digits."""
    params, x, h0 = inputs()
    x *= 50  # next to no state gets through
    alone, info = run(dense, params, x, h0)
    x[1] /= 50
    other, more = run(dense, params, x, h0)
    np.testing.assert_array_equal(alone[0], other[0])
    assert more.iterations > info.iterations


# Bad input


PARAMS, X, H0 = inputs()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "magic"}, "method must be one of .*'newton'.* got 'magic'"),
        ({"window": 0}, "window must be at least one step, got 0"),
        ({"max_iters": -1}, "max_iters must be >= 0, got -1"),
        ({"tol": 1e-8}, r"tol must be at least 1\.19e-07, the resolution of float32, got 1e-08"),
        ({"tol": float("nan")}, "tol must be at least"),
        ({"relaxation": 0.0}, "relaxation must be positive and finite, got 0.0"),
        ({"clip": -1.0}, "clip must be positive"),
        ({"reset": np.zeros((2, 3), bool)}, r"reset must be bool \(b t\) = \(2, 24\)"),
        ({"guess": X[:, 1:]}, r"guess must be \(b t \.\.\.\) = \(2, 24, 4\)"),
        ({"h0": H0[:1]}, "with the b of h0 and one t >= 1"),
        ({"x": X[:, :0]}, "with the b of h0 and one t >= 1"),
        ({"x": ()}, r"x must be a pytree of at least one \(b t \.\.\.\)"),
        ({"step": lambda p, h, x: h[:, :2]}, r"step must give a state like the one .* \(2, 4\)"),
        ({"step": lambda p, h, x: h.astype(jnp.bfloat16)}, "float32 .* got .*bfloat16"),
        ({"axis": "seq"}, "the current mesh has no axis 'seq'"),
        ({"axis": "seq", "window": 4}, "there are no windows"),
    ],
)
def test_bad_input_is_named(options, message):
    arguments = {"step": dense, "params": PARAMS, "x": X, "h0": H0} | options
    with pytest.raises(ValueError, match=message):
        newton_scan(**arguments)
