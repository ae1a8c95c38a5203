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


@pytest.mark.parametrize("method", ["newton", "sequential"])
def test_values_and_gradients_of_the_layer(case, model, method):
    """In float32."""
    cotangent = jnp.asarray(case["cotangent"])

    @jax.jit
    def run(model, x, y0):
        def loss(model, x, y0):
            u = model.input(x)
            step, params = gru, GRUParams(model.recurrent[...], model.candidate_bias[...])
            y, _ = newton_scan(step, params, u, y0, jacobian="dense", method=method)
            return jnp.sum(y * cotangent), y

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(model, x, y0)

    (gradient, dx, dy0), y = run(model, jnp.asarray(case["x"]), jnp.asarray(case["y0"]))
    tensors = to_tensors(find("deer_elk"), model, gradient) | {"x": dx, "y0": dy0}
    for name, got in {"y_seq": y, "deer_y": y}.items():
        check(case, name, got)
    for prefix in ("grad_", "deer_grad_"):
        for name in case.names(prefix):
            check(case, name, tensors[name.removeprefix(prefix)])
    wrong = case["quasi_grad_x_WRONG"]  # one solve with the diagonals, as the original does
    assert np.max(np.abs(dx - wrong)) > 0.1 * np.max(np.abs(dx))


def check(case, name, got):
    """No gap is stated, and cells of a large gain amplify rounding: a gain of 6 over 60 steps gives
    1.1e-5 of the largest gradient in float32."""
    assert_close(got, case[name], rtol=LARGEST_RELATIVE_ERROR, name=name)


def test_the_layer_takes_a_state(case, model):
    y, last = jax.jit(model)(jnp.asarray(case["x"]), jnp.asarray(case["y0"]))
    check(case, "y_seq", y)
    np.testing.assert_array_equal(last, y[:, -1])


@pytest.fixture(scope="module")
def improve(case, model):
    """(iterate, method, variance) -> the next iterate, in float64."""
    with jax.enable_x64(True):
        params = {
            name: jnp.asarray(value, jnp.float64)
            for name, value in to_tensors(find("deer_elk"), model).items()
        }
        x, y0 = (jnp.asarray(case[name], jnp.float64) for name in ("x", "y0"))
        width = y0.shape[1]
        u = jnp.einsum("bti,gi->btg", x, params["weight_ih"]) + params["bias"][None, None]
        u = u.reshape(*u.shape[:2], 3, width)
        recurrent = params["weight_hh"].T.reshape(width, 3, width)

    @functools.partial(jax.jit, static_argnames=("method", "variance", "iterations"))
    def run(guess, method, variance=1.0, iterations=1):
        return newton_scan(
            gru,
            GRUParams(recurrent, params["bias_n"]),
            u,
            y0,
            jacobian="dense",
            method=method,
            guess=guess,
            max_iters=iterations,
            tol=RESOLUTION,
            variance=variance,
            safeguard=False,
            check=False,
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
    """Rounding is amplified from iterate to iterate as the iterates are. The original's filter adds
    1e-9 to the diagonal of what it inverts, which shows as 2e-10 in the iterates."""
    want, exact = case[name], case["y_seq"]
    errors = np.max(np.abs(want - exact), axis=(1, 2, 3))
    growth = np.maximum(1, np.cumprod(np.maximum(errors, 1)))
    for k, (left, right) in enumerate(zip(got, want, strict=True)):
        allowed = (1e-8 if "elk" in name else 1e-10) * growth[k]
        assert np.max(np.abs(left - right)) <= allowed, (name, k)
    if f"{name}_error" in case:
        ours = np.max(np.abs(got - exact), axis=(1, 2, 3))
        np.testing.assert_allclose(ours, case[f"{name}_error"], rtol=1e-5, atol=1e-9)


def test_iterations_until_updates_are_small(case, improve):
    with jax.enable_x64(True):
        for kind in ("newton", "quasi"):
            want = case[f"{kind}_iterations_to_tol"]
            h = jnp.zeros_like(jnp.asarray(case["y_seq"]))
            counts = np.zeros_like(want)
            for k in range(1, int(np.max(want)) + 2):
                new, _ = improve(h, METHODS.get(kind, kind))
                small = np.max(np.abs(new - h), axis=(1, 2)) <= 1e-7
                counts = np.where((counts == 0) & small, k, counts)
                h = new
            # Where iterates stray far, the last digits decide when they come back: 41 instead of
            # 42 where the error has been 1e9.
            strays = np.max(case[f"{kind}_trace_error"]) > 1
            np.testing.assert_allclose(counts, want, rtol=0, atol=2 if strays else 0)


def test_convergence_is_reported(case, improve):
    with jax.enable_x64(True):
        guess = jnp.broadcast_to(jnp.asarray(case["y0"], jnp.float64)[:, None], case["y_seq"].shape)
        y, info = improve(guess, "newton", iterations=int(guess.shape[1]))
        np.testing.assert_array_equal(
            np.broadcast_to(info.converged, y.shape), case["deer_success"]
        )
        case.check("deer_y", y)


def test_the_table_round_trips(case, model, tmp_path):
    check_round_trip(case, model, tmp_path)


def test_every_array_was_looked_at(case):
    """Last in this file: the tests above share the case and say what they have looked at."""
    case.assert_all_looked_at()
