"""Time over devices: the numbers of one device, and nothing sent but carries."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.analysis.collectives import exchanges
from jaxrec.ops.time import (
    linear_scan,
    matrix_scan,
    selective_scan,
    sharded_linear_scan,
    sharded_matrix_scan,
    sharded_selective_scan,
)

BATCH, TIME, WIDTH = 2, 24, 3
MESHES = {"seq": {"seq": 8}, "data and seq": {"data": 2, "seq": 4}, "one device": {"seq": 1}}


def mesh(sizes):
    count = int(np.prod(list(sizes.values())))
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=jax.devices()[:count]
    )


def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)

    def draw(*shape):
        x = rng.normal(size=shape)
        return (x + 1j * rng.normal(size=shape) if dtype == np.complex64 else x).astype(dtype)

    a, b, h0 = draw(BATCH, TIME, WIDTH), draw(BATCH, TIME, WIDTH), draw(BATCH, WIDTH)
    return a / np.maximum(1, np.abs(a)), b, h0, rng.random((BATCH, TIME)) < 0.15


def loss_and_gradient(scan, reset, weights):
    """The sum of h and of the last state, each times its weights, and its gradients."""

    def loss(a, b, h0):
        h, last = scan(a, b, h0, reset=reset)
        total = jnp.sum(h * weights[0]) + jnp.sum(last * weights[1])
        return jnp.real(total), (h, last)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def close(got, want):
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=2e-6 * np.max(np.abs(right)))


@pytest.mark.parametrize("exchange", ["all_gather", "ppermute"])
@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize(
    "sizes, dtype, reverse, method",
    [
        ("seq", np.float32, False, "auto"),
        ("seq", np.float32, True, "auto"),
        ("data and seq", np.complex64, False, "associative"),
        ("data and seq", np.complex64, True, "sequential"),
        ("one device", np.float32, False, "chunked"),
    ],
)
def test_equals_one_device(sizes, dtype, reverse, method, with_resets, exchange):
    *arrays, reset = inputs(dtype)
    reset = reset if with_resets else None
    weights = inputs(dtype)[1:3]

    def alone(*args, reset):
        return linear_scan(*args, reverse=reverse, reset=reset)

    def spread(*args, reset):
        options = {"reverse": reverse, "reset": reset, "method": method}
        return sharded_linear_scan(*args, axis="seq", exchange=exchange, **options)

    want = jax.device_get(loss_and_gradient(alone, reset, weights)(*arrays))
    with jax.set_mesh(mesh(MESHES[sizes])):
        got = jax.device_get(loss_and_gradient(spread, reset, weights)(*arrays))
    close(got, want)


@pytest.mark.parametrize("exchange", ["all_gather", "ppermute"])
@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("sizes", ["seq", "data and seq"])
def test_selective_scan_equals_one_device(sizes, with_resets, exchange):
    rng = np.random.default_rng(0)
    states = 2

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    x, dt = draw(BATCH, TIME, WIDTH), np.abs(draw(BATCH, TIME, WIDTH))
    b, c = draw(BATCH, TIME, states), draw(BATCH, TIME, states)
    arrays = (x, dt, -np.abs(draw(WIDTH, states)), b, c, draw(BATCH, WIDTH, states))
    reset = inputs()[3] if with_resets else None
    weights = draw(BATCH, TIME, WIDTH), draw(BATCH, WIDTH, states)

    def loss_and_gradient(scan):
        def loss(*arrays):
            y, last = scan(*arrays, reset=reset)
            return jnp.sum(y * weights[0]) + jnp.sum(last * weights[1]), (y, last)

        every = tuple(range(len(arrays)))
        run = jax.jit(jax.value_and_grad(loss, argnums=every, has_aux=True))
        return jax.device_get(run(*arrays))

    want = loss_and_gradient(selective_scan)
    with jax.set_mesh(mesh(MESHES[sizes])):
        got = loss_and_gradient(
            functools.partial(sharded_selective_scan, axis="seq", exchange=exchange, chunk=4)
        )
    close(got, want)


HEADS, KEYS, VALUES = 2, 4, 3


def matrix_inputs(rule, decay):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    shape = (BATCH, TIME, HEADS)
    k = draw(*shape, KEYS)
    case = {"q": draw(*shape, KEYS), "k": k / np.linalg.norm(k, axis=-1, keepdims=True)}
    case |= {"v": draw(*shape, VALUES), "state": draw(BATCH, HEADS, KEYS, VALUES)}
    if decay is not None:
        case["log_decay"] = -np.abs(draw(*shape) if decay == "head" else draw(*shape, KEYS))
    if rule == "delta":
        case["beta"] = 1 / (1 + np.exp(-draw(*shape)))
    return case


@pytest.mark.parametrize("exchange", ["all_gather", "ppermute"])
@pytest.mark.parametrize(
    "sizes, rule, decay, with_resets",
    [
        ("seq", "gated", None, True),
        ("data and seq", "gated", "head", False),
        ("seq", "gated", "key", True),
        ("data and seq", "delta", None, False),
        ("one device", "delta", "head", True),
        ("seq", "delta", "key", True),
    ],
)
def test_matrix_scan_equals_one_device(sizes, rule, decay, with_resets, exchange):
    case = matrix_inputs(rule, decay)
    reset = inputs()[3] if with_resets else None
    weights = case["v"], case["state"]

    def loss_and_gradient(scan):
        def loss(case):
            y, last = scan(**case, rule=rule, reset=reset, chunk=2)
            return jnp.sum(y * weights[0]) + jnp.sum(last * weights[1]), (y, last)

        return jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(case))

    want = loss_and_gradient(matrix_scan)
    with jax.set_mesh(mesh(MESHES[sizes])):
        got = loss_and_gradient(
            functools.partial(sharded_matrix_scan, axis="seq", exchange=exchange)
        )
    close(got, want)


def test_normalised_matrix_scan_of_shared_keys_equals_one_device():
    case = {name: np.abs(matrix_inputs("gated", None)[name]) for name in "qkv"}
    case |= {name: case[name][:, :, :1] for name in "qk"}
    want = jax.jit(lambda case: matrix_scan(**case, normalise=1e-6))(case)
    with jax.set_mesh(mesh({"seq": 8})):
        scan = functools.partial(sharded_matrix_scan, axis="seq", normalise=1e-6)
        close(jax.jit(lambda case: scan(**case))(case), want)


@pytest.mark.parametrize(
    "rule, decay", [("gated", "head"), ("gated", "key"), ("delta", "head"), ("delta", "key")]
)
def test_heads_of_a_matrix_scan_may_lie_on_different_devices(rule, decay):
    """The compiler needs no help: heads do not talk, so nothing is sent, with the gradient too."""
    case = matrix_inputs(rule, decay)
    run = functools.partial(matrix_scan, rule=rule, chunk=8)

    def pull_back(case, dy, dlast):
        out, pull = jax.vjp(lambda case: run(**case), case)
        return out, pull((dy, dlast))

    cotangents = case["v"], case["state"]
    want = jax.jit(pull_back)(case, *cotangents)
    devices = mesh({"model": HEADS})
    with jax.set_mesh(devices):
        heads_second = jax.NamedSharding(devices, jax.P(None, "model"))
        heads_third = jax.NamedSharding(devices, jax.P(None, None, "model"))
        places = {name: heads_second if name == "state" else heads_third for name in case}
        every = (places, heads_third, heads_second)
        program = jax.jit(pull_back, in_shardings=every).lower(case, *cotangents).compile()
        close(program(*jax.device_put((case, *cotangents), every)), want)
    assert "all-" not in program.as_text() and "collective" not in program.as_text()


def test_without_a_state_it_begins_at_zero():
    a, b, h0, _ = inputs()
    with jax.set_mesh(mesh({"seq": 4})):
        got = jax.device_get(jax.jit(lambda a, b: sharded_linear_scan(a, b, axis="seq"))(a, b))
    close(got, linear_scan(a, b, np.zeros_like(h0)))


def collectives(program):
    """How often each kind of collective stands in a compiled program, and the largest result."""
    found = re.findall(
        r"= \w+\[([\d,]*)\]\S* "
        r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
        program.as_text(),
    )
    sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape, _ in found]
    kinds = [kind for _, kind in found]
    return {kind: kinds.count(kind) for kind in set(kinds)}, max(sizes)


@pytest.mark.parametrize(
    "exchange, forward, both",
    [
        ("all_gather", {"all-gather": 1}, {"all-gather": 2}),
        (
            "ppermute",
            {"collective-permute": 4, "all-reduce": 1},
            {"collective-permute": 8, "all-reduce": 1},  # nobody asks for the last state again
        ),
    ],
)
def test_only_carries_travel(exchange, forward, both):
    """log2(8) rounds and one shift by ppermute, or one gather; the gradient as much again."""
    a, b, h0, _ = inputs()

    def scan(a, b, h0):
        return sharded_linear_scan(a, b, h0, axis="seq", exchange=exchange)

    devices = mesh({"seq": 8})
    with jax.set_mesh(devices):
        over_time = jax.NamedSharding(devices, jax.P(None, "seq"))
        everywhere = jax.NamedSharding(devices, jax.P())
        places = (over_time, over_time, everywhere)

        def pull_back(a, b, h0, dh, dlast):
            return jax.vjp(scan, a, b, h0)[1]((dh, dlast))

        compiled = jax.jit(scan, in_shardings=places).lower(a, b, h0).compile()
        backward = (
            jax.jit(pull_back, in_shardings=(*places, over_time, everywhere))
            .lower(a, b, h0, b, h0)
            .compile()
        )
    largest = 8 * 2 * BATCH * WIDTH  # every device's map
    for program, counts in ((compiled, forward), (backward, both)):
        found, size = collectives(program)
        assert found == counts
        assert size <= largest


@pytest.mark.parametrize("exchange", ["all_gather", "ppermute"])
def test_rows_and_channels_stay_where_other_axes_split_them(exchange):
    """Only devices that share rows and channels exchange, and only the maps of these."""
    sizes = {"data": 2, "seq": 2, "model": 2}
    devices, width = mesh(sizes), 2 * WIDTH
    a, b = np.ones((2, BATCH, TIME, width), np.float32)
    place = jax.NamedSharding(devices, jax.P("data", "seq", "model"))

    def loss(a, b):
        h, last = sharded_linear_scan(a, b, axis="seq", exchange=exchange)
        return jnp.sum(h * h) + jnp.sum(last)

    with jax.set_mesh(devices):
        step = jax.jit(jax.grad(loss, (0, 1)), in_shardings=place, out_shardings=place)
        text = step.lower(a, b).compile().as_text()
    found = exchanges(text, sizes)
    assert found and all(one.axes == ("seq",) for one in found)
    most = 2 * 2 * (BATCH // 2) * (width // 2)
    assert all(np.prod(shape) <= most for one in found for shape in one.shapes)


@pytest.mark.parametrize("rule, width", [("gated", 1 + VALUES), ("delta", KEYS + VALUES)])
def test_only_carries_of_a_matrix_scan_travel(rule, width):
    case = matrix_inputs(rule, "head")
    devices = mesh({"seq": 8})
    over_time, everywhere = (jax.NamedSharding(devices, jax.P(*p)) for p in ((None, "seq"), ()))
    places = {name: everywhere if name == "state" else over_time for name in case}

    def scan(case):
        return sharded_matrix_scan(**case, axis="seq", rule=rule)

    def pull_back(case, dy, dlast):
        return jax.vjp(scan, case)[1]((dy, dlast))

    with jax.set_mesh(devices):
        forward = jax.jit(scan, in_shardings=(places,)).lower(case).compile()
        both = (
            jax.jit(pull_back, in_shardings=(places, over_time, everywhere))
            .lower(case, case["v"], case["state"])
            .compile()
        )
    for program, count in ((forward, 1), (both, 2)):
        found, size = collectives(program)
        assert found == {"all-gather": count}
        assert size == 8 * BATCH * HEADS * KEYS * width


@pytest.mark.parametrize(
    "change, says",
    [
        ({"axis": "sqe"}, "the current mesh has no axis 'sqe'"),
        ({"exchange": "broadcast"}, "exchange must be one of"),
        ({"method": "fast"}, "method must be one of"),
    ],
)
def test_what_is_wrong_is_said(change, says):
    a, b, h0, _ = inputs()
    with jax.set_mesh(mesh({"seq": 4})), pytest.raises(ValueError, match=says):
        sharded_linear_scan(a, b, h0, **({"axis": "seq"} | change))


def test_steps_must_divide():
    a, b, h0, _ = inputs()
    with jax.set_mesh(mesh({"seq": 7})), pytest.raises(ValueError, match="24 steps do not divide"):
        sharded_linear_scan(a, b, h0, axis="seq")
