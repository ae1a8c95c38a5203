"""Dense GRUs by DEER, quasi-DEER, ELK and quasi-ELK: values, gradients, and every iterate."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.convert.engine import find, to_tensors
from jaxrec.ops.cells import GRUParams, gru
from jaxrec.ops.newton import newton_scan
from jaxrec.testing import assert_close
from tests.golden.harness import LARGEST_RELATIVE_ERROR, cases, check_round_trip

FOLDERS = cases("deer_elk")
RESOLUTION = 2.0**-52


@pytest.fixture(scope="module")
def loop_gaps(case, model):
    """What float32 does to a plain loop and to its gradients, which large gains amplify: the
    largest error of each."""
    cotangent = jnp.asarray(case["cotangent"])

    @jax.jit
    def run(model, x, y0):
        def loss(model, x, y0):
            params = GRUParams(model.recurrent[...], model.candidate_bias[...])

            def body(h, u):
                h = gru(params, h, u)
                return h, h

            _, y = jax.lax.scan(body, y0, jnp.swapaxes(model.input(x), 0, 1))
            y = jnp.swapaxes(y, 0, 1)
            return jnp.sum(y * cotangent), y

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(model, x, y0)

    found = named(model, *run(model, jnp.asarray(case["x"]), jnp.asarray(case["y0"])))
    return {name: np.max(np.abs(got - case[name])) for name, got in found.items() if name in case}


def named(model, gradients, y):
    gradient, dx, dy0 = gradients
    tensors = to_tensors(find("deer_elk"), model, gradient) | {"x": dx, "y0": dy0}
    return {"y_seq": y} | {f"grad_{name}": value for name, value in tensors.items()}


@pytest.mark.parametrize("method", ["newton", "quasi_newton", "sequential"])
def test_values_and_gradients_of_the_layer(case, model, loop_gaps, method):
    """In float32; of quasi-Newton too, whose gradient in the original is that of the diagonals."""
    cotangent = jnp.asarray(case["cotangent"])

    @jax.jit
    def run(model, x, y0):
        def loss(model, x, y0):
            u = model.input(x)
            step, params = gru, GRUParams(model.recurrent[...], model.candidate_bias[...])
            y, _ = newton_scan(step, params, u, y0, jacobian="dense", method=method)
            return jnp.sum(y * cotangent), y

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(model, x, y0)

    found = named(model, *run(model, jnp.asarray(case["x"]), jnp.asarray(case["y0"])))
    assert set(case.names("grad_")) <= found.keys()
    for name, got in found.items():
        for array in (name, f"deer_{name.removesuffix('_seq')}"):
            if array in case:
                check(case, array, got, loop_gaps[name])
    case["quasi_grad_x_WRONG"]


def check(case, name, got, gap):
    """No gap is stated: in float32 ten times that of a plain loop, or 1e-4 of the largest, which a
    gain of 6 over 60 steps uses a tenth of."""
    assert_close(got, case[name], rtol=LARGEST_RELATIVE_ERROR, atol=10 * gap, name=name)


def test_the_layer_takes_a_state(case, model, loop_gaps):
    y, last = jax.jit(model)(jnp.asarray(case["x"]), jnp.asarray(case["y0"]))
    check(case, "y_seq", y, loop_gaps["y_seq"])
    np.testing.assert_array_equal(last, y[:, -1])


@pytest.fixture(scope="module")
def tensors(case, model):
    """Weights, x and y0 in float64."""
    with jax.enable_x64(True):
        found = to_tensors(find("deer_elk"), model) | {"x": case["x"], "y0": case["y0"]}
        return {name: jnp.asarray(value, jnp.float64) for name, value in found.items()}


def solve(tensors, **options):
    width = tensors["y0"].shape[1]
    u = jnp.einsum("bti,gi->btg", tensors["x"], tensors["weight_ih"])
    u = (u + tensors["bias"][None, None]).reshape(*u.shape[:2], 3, width)
    recurrent = tensors["weight_hh"].T.reshape(width, 3, width)
    params = GRUParams(recurrent, tensors["bias_n"])
    options = {"jacobian": "dense", "check": False} | options
    return newton_scan(gru, params, u, tensors["y0"], **options)


@pytest.mark.parametrize("method", ["newton", "sequential"])
def test_values_and_gradients_in_float64(case, tensors, method):
    with jax.enable_x64(True):
        cotangent = jnp.asarray(case["cotangent"], jnp.float64)

        @jax.jit
        def run(tensors):
            def loss(tensors):
                y, _ = solve(tensors, method=method)
                return jnp.sum(y * cotangent), y

            return jax.grad(loss, has_aux=True)(tensors)

        gradient, y = run(tensors)
        found = {f"grad_{name}": value for name, value in gradient.items()} | {"y_seq": y}
        for name, got in found.items():
            if name in case:
                # Measured: 1e-12 of the largest gradient after 60 steps of a gain of 6.
                assert_close(got, case[name], rtol=1e-9, name=name)


@pytest.fixture(scope="module")
def improve(case, tensors):
    """(iterate, method, variance) -> the next iterate, in float64."""

    @functools.partial(jax.jit, static_argnames=("method", "variance", "iterations"))
    def run(guess, method, variance=1.0, iterations=1):
        return solve(
            tensors,
            method=method,
            guess=guess,
            max_iters=iterations,
            tol=RESOLUTION,
            window=guess.shape[1],
            variance=variance,
            safeguard=False,
        )

    return run


METHODS = {"": "newton", "quasi": "quasi_newton", "elk": "elk", "quasi_elk": "quasi_elk"}


def test_every_iterate(case, improve):
    with jax.enable_x64(True):
        for name in case.names(""):
            match = re.fullmatch(r"(newton|quasi|elk|quasi_elk)(?:_sigmasq(.+))?_trace", name)
            if match is None:
                continue
            method = METHODS.get(match[1], match[1])
            variance = float(match[2] or 1)
            want = case[name]
            h, found = jnp.zeros_like(want[0]), []
            for _ in range(len(want)):
                found.append(np.asarray(h))
                h, _ = improve(h, method, variance)
            check_trace(case, name, np.stack(found))


def check_trace(case, name, got):
    """Rounding is amplified from iterate to iterate as the iterates are. Where it may have come to
    a hundredth, or an iterate is not finite, there is nothing to compare from there on. The
    original's filter adds 1e-9 to the diagonal of what it inverts, which shows as 2e-10 in the
    iterates."""
    want, exact = case[name], case["y_seq"]
    stated = [case[other] for other in case.names(f"{name}_error")]
    allowed = 1e-8 if "elk" in name else 1e-10
    assert np.isfinite(want[0]).all(), "an original begins at zero"
    for k, (left, right) in enumerate(zip(got, want, strict=True)):
        error = np.max(np.abs(right - exact))
        if not (np.isfinite(error) and np.isfinite(left).all()):
            break
        allowed *= max(1, error)
        if allowed > 0.01 * max(1, error):
            break
        assert np.max(np.abs(left - right)) <= allowed, (name, k)
        for errors in stated:
            ours = np.max(np.abs(left - exact))
            np.testing.assert_allclose(ours, errors[k], rtol=1e-12, atol=allowed)


def test_iterations_until_updates_are_small(case, improve):
    with jax.enable_x64(True):
        for kind in ("newton", "quasi"):
            want = case[f"{kind}_iterations_to_tol"]
            zero = jnp.zeros_like(jnp.asarray(case["y_seq"]))
            most = int(np.max(want)) + 2
            counts = iterations_to_tol(improve, METHODS.get(kind, kind), zero, most)
            beside = iterations_to_tol(improve, METHODS.get(kind, kind), zero + 1e-14, most)
            # Where iterates stray far, the last digits decide when they come back: 41 instead of
            # 42 where the error has been 1e9. How much, another start in these digits shows.
            strays = np.nanmax(case[f"{kind}_trace_error"]) > 1
            atol = 2 + 2 * np.max(np.abs(counts - beside)) if strays else 0
            np.testing.assert_allclose(counts, want, rtol=0, atol=atol)


def iterations_to_tol(improve, method, h, most):
    """Of each element of the batch; so many at most."""
    counts = np.full(len(h), most)
    for k in range(1, most):
        new, _ = improve(h, method)
        small = np.max(np.abs(new - h), axis=(1, 2)) <= 1e-7
        counts = np.where((counts == most) & small, k, counts)
        h = new
    return counts


def test_convergence_is_reported(case, improve):
    """Newton's method needs no more iterations than there are steps."""
    with jax.enable_x64(True):
        guess = jnp.broadcast_to(jnp.asarray(case["y0"], jnp.float64)[:, None], case["y_seq"].shape)
        y, info = improve(guess, "newton", iterations=int(guess.shape[1]))
        success = case["deer_success"].reshape(len(y), -1).all(axis=1)
        assert info.converged or not success.all()
        assert_close(y[success], case["deer_y"][success], rtol=1e-5, name="deer_y")


def test_the_table_round_trips(case, model, tmp_path):
    check_round_trip(case, model, tmp_path)


def test_every_array_was_looked_at(case):
    """Last in this file: the tests above share the case and say what they have looked at."""
    case.assert_all_looked_at()
