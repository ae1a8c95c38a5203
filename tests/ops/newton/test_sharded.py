"""Newton's method with time over devices: the numbers of one device, forward and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.analysis.collectives import KINDS, exchanges
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


def kinds(found):
    """How often each kind of exchange runs."""
    return {kind: sum(one.times for one in found if one.kind == kind) for kind in KINDS}


@pytest.mark.parametrize("kind, size", [("diagonal", 2), ("block", 3), ("dense", 5)])
def test_one_exchange_of_maps_for_each_solve(kind, size):
    """Besides, an iteration hands one state to the next device and gathers a flag of each row."""
    params, x, h0, weights = inputs(kind)

    def solve(params, x, h0):
        options = {"jacobian": kind, "method": "newton", "safeguard": False, "check": False}
        return newton_scan(step, params, x, h0, axis="seq", **options)[0]

    devices = mesh(MESHES["seq"])
    over_time, everywhere = (jax.NamedSharding(devices, jax.P(*p)) for p in ((None, "seq"), ()))
    places = (everywhere, over_time, everywhere)

    def pull_back(params, x, h0, dh):
        return jax.vjp(solve, params, x, h0)[1](dh)

    with jax.set_mesh(devices):
        forward, both = (
            jax.jit(run, in_shardings=places[: len(arguments)])
            .lower(*arguments)
            .compile()
            .as_text()
            for run, places, arguments in (
                (solve, places, (params, x, h0)),
                (pull_back, (*places, over_time), (params, x, h0, weights)),
            )
        )
    once, twice = (exchanges(forward, MESHES["seq"], loops=loops) for loops in (1, 2))
    more = {name: n - kinds(once)[name] for name, n in kinds(twice).items()}
    assert more == dict.fromkeys(KINDS, 0) | {"all-gather": 2, "collective-permute": 1}
    every = h0.size * 8
    sizes = sorted(
        np.prod(one.shapes[0]) for one in twice if (one.kind, one.times) == ("all-gather", 2)
    )
    assert sizes == [8 * BATCH, every * size]
    backwards = {
        name: n - kinds(once)[name] for name, n in kinds(exchanges(both, MESHES["seq"])).items()
    }
    assert (backwards["all-gather"], backwards["collective-permute"]) == (1, 1)


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
