"""The loop over time against the definition, with rows that stay in place and rows that move."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.time import linear_scan
from jaxrec.ops.time.loop import LONG, over_time

# Short rows move, long ones and a batch of one stay in place.
shapes = pytest.mark.parametrize("shape", [(3, 5, 2), (3, 5, LONG), (1, 5, 2)])


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


def test_no_input_is_a_copy_where_rows_stay_in_place():
    """With time moved to the front, the scan would hold its inputs and its result once more."""
    x = jax.ShapeDtypeStruct((1, 512, 64), jnp.float32)
    compiled = jax.jit(functools.partial(linear_scan, method="sequential")).lower(x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 64 * 4
