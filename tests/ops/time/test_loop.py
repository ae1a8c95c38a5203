"""The loop over time against the definition, with rows that stay in place and rows that move."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxrec.ops.newton import newton_scan
from jaxrec.ops.time import block_scan, linear_scan, matrix_scan, running_max
from jaxrec.ops.time import loop as loop_module
from jaxrec.ops.time.loop import LONG_ROW, over_time

# Short rows move, long ones and a batch of one stay in place.
shapes = pytest.mark.parametrize("shape", [(3, 5, 2), (3, 5, LONG_ROW), (1, 5, 2)])


def step(state, inputs):
    state = state + inputs["x"] * inputs["gate"][:, None]
    return state, {"sum": state, "first": state[:, 0]}


@shapes
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("unroll", [1, 3, 8])
def test_every_step_in_its_order(shape, reverse, unroll):
    rng = np.random.default_rng(0)
    x, gate = (rng.integers(-4, 5, size).astype(np.float32) for size in (shape, shape[:2]))
    start = np.ones((shape[0], shape[2]), np.float32)
    run = functools.partial(over_time, step, reverse=reverse, unroll=unroll)
    last, results = jax.jit(run)(start, {"x": x, "gate": gate})
    order = slice(None, None, -1) if reverse else slice(None)
    want = 1 + np.cumsum((x * gate[..., None])[:, order], axis=1)[:, order]
    np.testing.assert_array_equal(results["sum"], want)
    np.testing.assert_array_equal(results["first"], want[..., 0])
    np.testing.assert_array_equal(last, want[:, 0 if reverse else -1])


@shapes
def test_the_gradient_is_that_of_a_scan_also_to_what_a_step_refers_to(shape):
    rng = np.random.default_rng(0)
    x, seen = jnp.asarray(rng.normal(size=shape), jnp.float32), rng.integers(0, 2, shape[:2]) > 0

    def squares(weight, start, x, loop):
        def step(h, inputs):
            x, seen = inputs
            h = jnp.where(seen[:, None], jnp.tanh(weight[None] * h + x), h)
            return h, h

        return jnp.sum(loop(step, start, (x, seen))[1] ** 2)

    def plain(step, start, inputs):
        return lax.scan(step, start, jax.tree.map(lambda z: jnp.swapaxes(z, 0, 1), inputs))

    gradients = [
        jax.jit(jax.grad(functools.partial(squares, loop=loop), (0, 1, 2)))(
            jnp.full(shape[2], 0.7), jnp.ones((shape[0], shape[2])), x
        )
        for loop in (over_time, plain)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *gradients)


def test_a_second_gradient_adds_up_no_array_in_every_step():
    """That of places in an array is an array as large, to be added to those of all other steps."""

    def loss(a, b):
        return jnp.sum(linear_scan(a, b, method="sequential")[0] ** 2)

    def of_gradient(a, b):
        return jnp.sum(jax.grad(loss)(a, b) ** 2)

    def sums_in_loops(jaxpr, in_loop=False):
        for equation in jaxpr.eqns:
            is_sum = equation.primitive.name in ("add_any", "add")
            yield in_loop and is_sum and equation.outvars[0].aval.size >= x.size
            in_body = in_loop or equation.primitive.name in ("scan", "while")
            for nested in jaxprs_in_params(equation.params):
                yield from sums_in_loops(nested, in_body)

    x = jax.ShapeDtypeStruct((1, 64, 4), jnp.float32)
    assert not any(sums_in_loops(jax.make_jaxpr(jax.grad(of_gradient))(x, x).jaxpr))


def drawn(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.uniform(0.1, 0.9, shape), jnp.float32) for shape in shapes]


def cell(weight, h, x):
    return jnp.tanh(h @ weight + x)


# Eleven chunks of two steps: more than one round of the loop, and one that is not full.
OPS = {
    "linear_scan": (
        functools.partial(linear_scan, method="sequential"),
        drawn((2, 7, 3), (2, 7, 3), (2, 3)),
    ),
    "linear_scan, reverse": (
        functools.partial(linear_scan, method="sequential", reverse=True),
        drawn((2, 7, 3), (2, 7, 3), (2, 3)),
    ),
    "block_scan": (
        functools.partial(block_scan, method="sequential"),
        drawn((2, 7, 2, 2, 3), (2, 7, 2, 3), (2, 2, 3)),
    ),
    "running_max": (
        functools.partial(running_max, method="sequential"),
        drawn((2, 7, 3), (2, 7, 3), (2, 3)),
    ),
    "newton_scan": (
        lambda *args: newton_scan(cell, *args, method="sequential")[0],
        drawn((3, 3), (2, 7, 3), (2, 3)),
    ),
    "matrix_scan, gated": (
        lambda q, k, v, g, s: matrix_scan(q, k, v, -g, s, chunk=2),
        drawn((2, 21, 2, 3), (2, 21, 2, 3), (2, 21, 2, 4), (2, 21, 2), (2, 2, 3, 4)),
    ),
    "matrix_scan, delta": (
        lambda q, k, v, g, s: matrix_scan(q, k / 2, v, -g, s, rule="delta", chunk=2),
        drawn((2, 21, 2, 3), (2, 21, 2, 3), (2, 21, 2, 4), (2, 21, 2), (2, 2, 3, 4)),
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_the_same_in_place_and_with_time_in_front(name, monkeypatch):
    op, args = OPS[name]

    def values_and_gradients(long_row):
        monkeypatch.setattr(loop_module, "LONG_ROW", long_row)

        def loss(*args):  # traced anew for each way
            out = op(*args)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out)), out

        gradient = jax.grad(loss, range(len(args)), has_aux=True)
        if name == "running_max":  # has none
            return jax.jit(lambda *args: loss(*args)[1])(*args)
        return jax.jit(gradient)(*args)

    ways = [values_and_gradients(long_row) for long_row in (0, 10**9)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), *ways)


@shapes
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_it_runs_on_each_device_and_on_a_mesh_of_named_axes(shape, kind):
    batch, *rest = shape
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(2 * batch, *rest)), jnp.float32)
    want, _ = linear_scan(x, x, method="sequential")
    run = jax.grad(lambda x: jnp.sum(linear_scan(x, x, method="sequential")[0] ** 2))
    want_gradient = run(x)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(kind,))):
        if kind == AxisType.Explicit:
            x = jax.device_put(x, P("data"))
            got, got_gradient = linear_scan(x, x, method="sequential")[0], jax.jit(run)(x)
        else:
            places = {"in_specs": P("data"), "out_specs": P("data")}
            on_each = jax.shard_map(lambda x: linear_scan(x, x)[0], **places)
            got, got_gradient = jax.jit(on_each)(x), jax.jit(jax.shard_map(run, **places))(x)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(got_gradient, want_gradient, rtol=1e-5)


def test_no_input_is_a_copy_where_rows_stay_in_place():
    """With time moved to the front, the scan would hold its inputs and its result once more."""
    x = jax.ShapeDtypeStruct((1, 512, 64), jnp.float32)
    compiled = jax.jit(functools.partial(linear_scan, method="sequential")).lower(x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 64 * 4
