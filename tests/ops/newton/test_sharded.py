"""Newton's method with time over devices: the numbers of one device, forward and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.newton import newton_scan
from jaxrec.ops.time import block
from tests.ops.time.test_sharded import mesh

BATCH, TIME = 2, 16
MESHES = {"seq": {"seq": 8}, "data and seq": {"data": 2, "seq": 4}}
STATES = {"diagonal": (1, 4), "block": (2, 2), "dense": (4, 1)}


def step(params, h, x):
    return jnp.tanh(x + block.apply(params[None], h))


def inputs(kind, gain=0.6):
    rng = np.random.default_rng(0)
    size, width = STATES[kind]
    params = gain * rng.normal(size=(size, size, width))
    x, weights = rng.normal(size=(2, BATCH, TIME, size, width))
    h0 = rng.normal(size=(BATCH, size, width))
    return tuple(z.astype(np.float32) for z in (params, x, h0, weights))


def values_and_gradients(kind, args, reset, **options):
    *args, weights = args

    def loss(params, x, h0):
        h, info = newton_scan(step, params, x, h0, jacobian=kind, reset=reset, **options)
        return jnp.sum(h * weights), (h, info)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, (h, info)), gradients = run(*args)
    return (h, *gradients), info


@pytest.mark.parametrize(
    "kind, sizes, method, with_resets",
    [
        ("diagonal", "seq", "newton", True),
        ("block", "data and seq", "newton", True),
        ("dense", "data and seq", "newton", False),
        ("dense", "seq", "quasi_newton", False),
        ("block", "seq", "sequential", True),
    ],
)
def test_equals_one_device(kind, sizes, method, with_resets):
    args = inputs(kind)
    reset = np.random.default_rng(1).random((BATCH, TIME)) < 0.15 if with_resets else None
    want, _ = values_and_gradients(kind, args, reset, method="sequential")
    with jax.set_mesh(mesh(MESHES[sizes])):
        got, info = values_and_gradients(kind, args, reset, method=method, axis="seq")
    assert info.converged
    for left, right in zip(got, want, strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=2e-6 * np.max(np.abs(right)))


def test_what_does_not_settle_is_run_one_device_after_another():
    args = inputs("dense", gain=6.0)
    want, _ = values_and_gradients("dense", args, None, method="sequential")
    with jax.set_mesh(mesh(MESHES["seq"])):
        got, info = values_and_gradients(
            "dense", args, None, method="newton", axis="seq", max_iters=3
        )
    assert not info.converged
    assert info.fallbacks == 1
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)


def test_a_step_must_not_close_over_traced_values():
    params, x, h0, _ = inputs("dense")

    def run(params):
        closed = lambda _, h, x: step(params, h, x)  # noqa: E731
        return newton_scan(closed, (), x, h0, jacobian="dense", axis="seq")[0]

    with (
        jax.set_mesh(mesh(MESHES["seq"])),
        pytest.raises(ValueError, match="must not close over values that are being traced"),
    ):
        jax.jit(run)(params)


def test_steps_must_divide_over_the_devices():
    params, x, h0, _ = inputs("dense")
    with (
        jax.set_mesh(mesh(MESHES["seq"])),
        pytest.raises(ValueError, match="15 steps do not divide over seq=8 devices"),
    ):
        newton_scan(step, params, x[:, :15], h0, axis="seq")
