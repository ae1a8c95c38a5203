"""What the laws do not say of `running_max`: numbers by hand, no gradient, devices, its doors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.time import running_max, sharded_running_max
from tests import references
from tests.ops.time.test_sharded import collectives, mesh

METHODS = ("sequential", "associative", "auto")
methods = pytest.mark.parametrize("method", METHODS)


@functools.partial(jax.jit, static_argnames="method")
def run(log_decay, x, m0=None, reset=None, method="auto"):
    return running_max(log_decay, x, m0, reset=reset, method=method)


def inputs(batch=2, time=8, width=3):
    rng = np.random.default_rng(0)
    log_decay, x = -np.abs(rng.normal(size=(2, batch, time, width)))
    return log_decay.astype(np.float32), x.astype(np.float32)


@methods
def test_four_steps_by_hand(method):
    x = np.array([[5, 0, 3, 3]], np.float32)
    reset = np.array([[False, False, False, True]])
    m, last = run(np.float32(-1), x, method=method)
    np.testing.assert_array_equal(m, [[5, 4, 3, 3]])
    np.testing.assert_array_equal(last, [3])
    m, _ = run(np.float32(-1), x - 2, np.array([10], np.float32), reset, method=method)
    np.testing.assert_array_equal(m, [[9, 8, 7, 1]])


@methods
@pytest.mark.parametrize("time", [1, 8])
def test_nothing_before_the_first_step_is_less_than_anything(method, time):
    log_decay, x = inputs(time=time)
    m, last = run(log_decay, x - 1e30, method=method)
    np.testing.assert_array_equal(m[:, 0], x[:, 0] - 1e30)
    np.testing.assert_array_equal(last, m[:, -1])
    nothing, _ = run(log_decay, np.full_like(x, -np.inf), method=method)
    np.testing.assert_array_equal(nothing, np.full_like(x, -np.inf))


@methods
@pytest.mark.parametrize("time", [1, 8])
def test_no_gradient_passes(method, time):
    log_decay, x = inputs(time=time)

    def loss(log_decay, x, m0):
        m, last = running_max(log_decay, x, m0, method=method)
        return jnp.sum(m) + jnp.sum(last)

    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(log_decay, x, x[:, 0]):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@methods
def test_bfloat16_is_widened_and_float64_stays(method):
    log_decay, x = inputs()
    m, last = run(log_decay.astype(jnp.bfloat16), x.astype(jnp.bfloat16), method=method)
    assert m.dtype == last.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = log_decay.astype(np.float64), x.astype(np.float64)
        m, last = run(*wide, method=method)
        assert m.dtype == last.dtype == np.float64
        start, never = np.full((2, 3), -np.inf), np.zeros((2, 8), bool)
        np.testing.assert_allclose(m, references.running_max(*wide, start, never)[0], atol=1e-14)


@pytest.mark.parametrize("sizes", [{"seq": 8}, {"data": 2, "seq": 4}])
def test_over_devices_only_carries_travel(sizes):
    log_decay, x = inputs(time=24)
    reset = np.random.default_rng(1).random((2, 24)) < 0.1
    m0 = np.full((2, 3), 3, np.float32)
    want = references.running_max(log_decay, x, m0, reset)

    def spread(log_decay, x, m0, reset):
        return sharded_running_max(log_decay, x, m0, axis="seq", reset=reset)

    devices = mesh(sizes)
    with jax.set_mesh(devices):
        over_time = jax.NamedSharding(devices, jax.P(None, "seq"))
        places = (over_time, over_time, jax.NamedSharding(devices, jax.P()), over_time)
        arrays = jax.device_put((log_decay, x, m0, reset), places)
        program = jax.jit(spread).lower(*arrays).compile()
        got = jax.device_get(program(*arrays))
    for left, right in zip(got, want, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)
    counts, largest = collectives(program)
    # Beside another axis, whose split a gather would undo, it is a sum (`sharded.from_all`).
    assert counts == {"all-reduce" if "data" in sizes else "all-gather": 1}
    assert largest == sizes["seq"] * 2 * 2 * 3


def test_steps_must_divide_over_devices():
    with (
        jax.set_mesh(mesh({"seq": 3})),
        pytest.raises(ValueError, match=r"sharded_running_max: 8 steps do not divide over seq=3"),
    ):
        sharded_running_max(*inputs(), axis="seq")


CASE = dict(zip(("log_decay", "x"), inputs(2, 3, 4), strict=True))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"method": "fast"}, r"method must be one of \('auto', .*got 'fast'"),
        ({"x": CASE["x"][:, :0]}, r"at least one step, got t = 0 in x of shape \(2, 0, 4\)"),
        ({"x": CASE["x"][0, :, 0]}, r"x must be \(b t \.\.\.\), got shape \(3,\)"),
        ({"x": CASE["x"].astype(np.int32)}, r"x must be real floats, got int32"),
        ({"log_decay": CASE["x"] * 1j}, r"log_decay must be real floats, got complex64"),
        (
            {"log_decay": CASE["x"][:, :2]},
            r"log_decay must broadcast to x \(b t \.\.\.\), got \(2, 2, 4\) and \(2, 3, 4\)",
        ),
        (
            {"m0": np.zeros((3, 4), np.float32)},
            r"m0 must be \(b \.\.\.\) = \(2, 4\), got \(3, 4\)",
        ),
        (
            {"reset": np.zeros((2, 3), np.int32)},
            r"reset must be bool \(b t\) = \(2, 3\), got int32 \(2, 3\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    with pytest.raises(ValueError, match=f"^running_max: .*{message}"):
        running_max(**(CASE | changed))
