"""Dense GRUs by DEER, quasi-DEER, ELK and quasi-ELK: values, gradients, and every iterate."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.convert.engine import find, read_tensors, to_tensors
from jaxrec.ops.cells import GRUParams, gru
from jaxrec.ops.newton import newton_scan
from jaxrec.testing import assert_close
from tests.golden.harness import LARGEST_RELATIVE_ERROR, cases, check_round_trip

FOLDERS = cases("deer_elk")
RESOLUTION = 2.0**-52


@pytest.fixture(scope="module")
def raw(case):
    """Weights as the file has them, x and y0: nothing here went through the table of names."""
    return read_tensors(case.folder) | {"x": case["x"], "y0": case["y0"]}


@pytest.fixture(scope="module")
def loop_gaps(case, raw):
    """What float32 does to a plain loop and to its gradients, which large gains amplify: the
    largest error of each."""
    tensors = {name: jnp.asarray(value, jnp.float32) for name, value in raw.items()}
    found = values_and_gradients(tensors, jnp.asarray(case["cotangent"]), "sequential")
    return {name: np.max(np.abs(got - case[name])) for name, got in found.items() if name in case}


def named(model, gradients, y):
    gradient, dx, dy0 = gradients
    tensors = to_tensors(find("deer_elk"), model, gradient) | {"x": dx, "y0": dy0}
    return {"y_seq": y} | {f"grad_{name}": value for name, value in tensors.items()}


@pytest.mark.parametrize("method", ["newton", "quasi_newton", "sequential"])
def test_values_and_gradients_of_the_layer(case, model, loop_gaps, method):
    """In float32; of quasi-Newton too."""
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


def check(case, name, got, gap):
    """No gap is stated: in float32 ten times that of a plain loop, or 1e-4 of the largest, which a
    gain of 6 over 60 steps uses a tenth of."""
    assert_close(got, case[name], rtol=LARGEST_RELATIVE_ERROR, atol=10 * gap, name=name)


def test_the_layer_takes_a_state(case, model, loop_gaps):
    y, last = jax.jit(model)(jnp.asarray(case["x"]), jnp.asarray(case["y0"]))
    check(case, "y_seq", y, loop_gaps["y_seq"])
    np.testing.assert_array_equal(last, y[:, -1])


@pytest.fixture(scope="module")
def tensors(raw):
    """In float64."""
    with jax.enable_x64(True):
        return {name: jnp.asarray(value, jnp.float64) for name, value in raw.items()}


def solve(tensors, **options):
    width = tensors["y0"].shape[1]
    u = jnp.einsum("bti,gi->btg", tensors["x"], tensors["weight_ih"])
    u = (u + tensors["bias"][None, None]).reshape(*u.shape[:2], 3, width)
    recurrent = tensors["weight_hh"].T.reshape(width, 3, width)
    params = GRUParams(recurrent, tensors["bias_n"])
    options = {"jacobian": "dense", "check": False} | options
    return newton_scan(gru, params, u, tensors["y0"], **options)


def values_and_gradients(tensors, cotangent, method, **options):
    @jax.jit
    def run(tensors):
        def loss(tensors):
            y, _ = solve(tensors, method=method, **options)
            return jnp.sum(y * cotangent), y

        return jax.grad(loss, has_aux=True)(tensors)

    gradient, y = run(tensors)
    return {f"grad_{name}": value for name, value in gradient.items()} | {"y_seq": y}


@pytest.mark.parametrize("method", ["newton", "sequential"])
def test_values_and_gradients_in_float64(case, tensors, method):
    with jax.enable_x64(True):
        cotangent = jnp.asarray(case["cotangent"], jnp.float64)
        for name, got in values_and_gradients(tensors, cotangent, method).items():
            if name in case:
                # Measured: 4e-15 of the largest; Newton and loop up to 5e-13 apart at a gain of 8.
                assert_close(got, case[name], rtol=1e-11, name=name)


def test_quasi_newton_of_the_original_differentiates_with_the_diagonals(case, tensors):
    """Which is another gradient; ours is that of the solution unless it is told that the
    Jacobian has nothing else."""
    if "quasi_grad_x_WRONG" not in case:
        return

    def diagonals(params, h, u):
        def column(unit):
            direction = jnp.broadcast_to(unit, h.shape)
            return jax.jvp(lambda h: gru(params, h, u), (h,), (direction,))[1]

        return jnp.einsum("i...i->...i", jax.vmap(column)(jnp.eye(h.shape[-1], dtype=h.dtype)))

    with jax.enable_x64(True):
        cotangent = jnp.asarray(case["cotangent"], jnp.float64)
        options = {"jacobian": diagonals, "max_iters": 2 * cotangent.shape[1]}
        found = values_and_gradients(tensors, cotangent, "newton", **options)
        # Measured: 5e-9 of the largest, where the original's iteration ends.
        assert_close(found["grad_x"], case["quasi_grad_x_WRONG"], rtol=1e-6, name="quasi_grad_x")


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
    a hundredth, or the original's iterate is not finite, there is nothing to compare from there on.
    The original's filter adds 1e-9 to the diagonal of what it inverts, which shows as 2e-10 in the
    iterates."""
    want, exact = case[name], case["y_seq"]
    stated = [case[other] for other in case.names(f"{name}_error")]
    allowed = 1e-8 if "elk" in name else 1e-10
    assert np.isfinite(want[0]).all(), "an original begins at zero"
    for k, (left, right) in enumerate(zip(got, want, strict=True)):
        error = np.max(np.abs(right - exact))
        allowed *= max(1, error)
        if not np.isfinite(error) or allowed > 0.01 * max(1, error):
            break
        assert np.isfinite(left).all(), (name, k)
        assert np.max(np.abs(left - right)) <= allowed, (name, k)
        for errors in stated:
            ours = np.max(np.abs(left - exact))
            np.testing.assert_allclose(ours, errors[k], rtol=1e-12, atol=allowed)


def test_iterations_until_updates_are_small(case, raw, improve):
    with jax.enable_x64(True):
        zero = np.zeros(case["y_seq"].shape)
        most = zero.shape[1] + 2  # after as many as there are steps, nothing changes
        for kind in ("newton", "quasi"):
            want = case[f"{kind}_iterations_to_tol"]
            method = METHODS.get(kind, kind)
            counts = iterations_to_tol(lambda h, m=method: improve(h, m)[0], zero, most)
            # Where iterates stray far, the last digits decide when they come back: in 41 instead of
            # 42 where the error has been 1e9. How much they do, NumPy shows from other digits.
            atol = 0
            if np.nanmax(case[f"{kind}_trace_error"]) > 1:
                again = functools.partial(improve_in_numpy, raw, is_diagonal=kind == "quasi")
                starts = [iterations_to_tol(again, zero + x, most) for x in (0, 1e-14, -1e-14)]
                atol = 2 + 2 * np.max(np.ptp(starts, axis=0))
            np.testing.assert_allclose(counts, want, rtol=0, atol=atol)


def iterations_to_tol(improve, h, most):
    """Of each element of the batch; so many at most."""
    counts = np.full(len(h), most)
    for k in range(1, most):
        new = improve(h)
        small = np.max(np.abs(new - h), axis=(1, 2)) <= 1e-7
        counts = np.where((counts == most) & small, k, counts)
        h = new
    return counts


def improve_in_numpy(raw, h, *, is_diagonal):
    """One iteration of Newton's method with derivatives by hand, one step after another."""
    wide = {name: np.asarray(value, np.float64) for name, value in raw.items()}
    u = wide["x"] @ wide["weight_ih"].T + wide["bias"]
    before = np.concatenate([wide["y0"][:, None], h[:, :-1]], axis=1)
    (wr, wz, wn), (ur, uz, un) = np.split(wide["weight_hh"], 3), np.split(u, 3, axis=-1)
    inner = before @ wn.T + wide["bias_n"]
    with np.errstate(over="ignore"):
        r, z = (1 / (1 + np.exp(-(u + before @ w.T))) for u, w in ((ur, wr), (uz, wz)))
    n = np.tanh(un + r * inner)
    values = n + z * (before - n)

    d_r, d_z = ((gate * (1 - gate))[..., None] * w for gate, w in ((r, wr), (z, wz)))
    d_n = (1 - n**2)[..., None] * (inner[..., None] * d_r + r[..., None] * wn)
    eye = np.eye(h.shape[-1])
    jacobian = (before - n)[..., None] * d_z + (1 - z)[..., None] * d_n + z[..., None] * eye
    if is_diagonal:
        jacobian = jacobian * eye
    new, last = [], wide["y0"]
    for t in range(h.shape[1]):
        last = values[:, t] + np.einsum("bij,bj->bi", jacobian[:, t], last - before[:, t])
        new.append(last)
    return np.stack(new, axis=1)


def test_convergence_is_reported(case, tensors):
    """Newton's method needs no more iterations than there are steps. Alone, the elements with which
    the original succeeds."""
    with jax.enable_x64(True):
        shape = case["y_seq"].shape
        success = case["deer_success"].reshape(len(case["deer_y"]), -1).all(axis=1)
        if not success.any():
            return
        chosen = tensors | {name: tensors[name][success] for name in ("x", "y0")}
        guess = jnp.broadcast_to(chosen["y0"][:, None], (success.sum(), *shape[1:]))
        options = {"max_iters": shape[1], "window": shape[1], "safeguard": False}
        y, info = jax.jit(lambda guess: solve(chosen, method="newton", guess=guess, **options))(
            guess
        )
        assert info.converged
        assert_close(y, case["deer_y"][success], rtol=1e-5, name="deer_y")


def test_the_table_round_trips(case, model, tmp_path):
    check_round_trip(case, model, tmp_path)


def test_every_array_was_looked_at(case):
    """Last in this file: the tests above share the case and say what they have looked at."""
    case.assert_all_looked_at()
