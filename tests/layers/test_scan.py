"""Layers run their scan over the devices among which the mesh splits time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.axes import merge_leading, time_axis
from jaxrec.layers.lssl import LSSLConfig
from jaxrec.layers.mamba import Mamba
from jaxrec.layers.rglru import RGLRU
from jaxrec.layers.s4d import S4DConfig
from jaxrec.layers.s5 import S5Config
from jaxrec.layers.scan import matrix_scan_over_time
from jaxrec.training.sharding import build_mesh
from tests.ops.time.test_sharded import collectives

BATCH, WIDTH = 2, 4


@pytest.mark.parametrize("spec, axis", [("data=8", None), ("data=2,seq=4", "seq")])
def test_the_axis_of_time_is_the_one_that_is_split(spec, axis):
    x = jnp.zeros((2, 3, 5, 7))
    assert time_axis() is None
    with jax.set_mesh(build_mesh(spec)):
        assert time_axis() == time_axis(8) == axis
        assert time_axis(6) is None
        assert merge_leading(x, 2).shape == ((6, 5, 7) if axis is None else x.shape)


@pytest.mark.parametrize("time", [16, 15])
def test_a_layer_gathers_no_sequence(time):
    """15 steps cannot be split evenly: correct, and left to the compiler."""
    layer = RGLRU(WIDTH, 2, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(BATCH, time, WIDTH)).astype(np.float32)
    state = layer.init_state(BATCH)
    want = jax.jit(layer)(x, state)
    mesh = build_mesh("seq=4")
    with jax.set_mesh(mesh):
        place = jax.NamedSharding(mesh, jax.P(None, "seq") if time == 16 else jax.P())
        program = jax.jit(layer, in_shardings=(place, None)).lower(x, state).compile()
        got = program(jax.device_put(x, place), state)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-6)
    if time == 16:
        counts, largest = collectives(program)
        assert counts == {"all-gather": 1}
        assert largest == 4 * 2 * BATCH * WIDTH < x.size


@pytest.mark.parametrize("time", [16, 15])
def test_a_matrix_scan_gathers_no_sequence(time):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(BATCH, time, 2, WIDTH)).astype(np.float32) for _ in range(3))
    want = jax.jit(matrix_scan_over_time)(q, k, v)
    mesh = build_mesh("seq=4")
    with jax.set_mesh(mesh):
        place = jax.NamedSharding(mesh, jax.P(None, "seq") if time == 16 else jax.P())
        program = jax.jit(matrix_scan_over_time, in_shardings=place).lower(q, k, v).compile()
        got = program(*jax.device_put((q, k, v), place))
    for left, right in zip(got, want, strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5)
    if time == 16:
        assert collectives(program)[0] == {"all-gather": 1}


LAYERS = {
    "S5": (S5Config(width=WIDTH, state=2, bidirectional=True).build, {"all-gather": 2}),
    "LSSL": (
        LSSLConfig(width=WIDTH, state=2, train_transition=True, train_step=True).build,
        {"all-gather": 1},
    ),
    "Mamba": (functools.partial(Mamba, WIDTH, 4, 2, 2), {"all-gather": 1, "collective-permute": 4}),
    "S4D": (S4DConfig(width=WIDTH, state=2).build, {"all-gather": 1}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_state_space_layer_exchanges_carries_only(name):
    """Complex states; of the gradients too, which are those of one device."""
    build, wanted = LAYERS[name]
    layer = build(rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(BATCH, 64, WIDTH)).astype(np.float32)

    def call(layer, x):
        return layer(x, layer.init_state(BATCH)) if name == "Mamba" else layer(x)

    def loss(layer, x):
        y, state = call(layer, x)
        ends = [jnp.sum(jnp.real(z * jnp.conj(z))) for z in jax.tree.leaves(state)]
        return sum(ends, jnp.sum(jnp.sin(y)))

    def graded(layer, x):  # a program of its own for every mesh
        return jax.value_and_grad(loss, argnums=(0, 1))(layer, x)

    want = jax.jit(graded)(layer, x)
    mesh = build_mesh("seq=4")
    with jax.set_mesh(mesh):
        place = jax.NamedSharding(mesh, jax.P(None, "seq"))
        forward = jax.jit(lambda layer, x: call(layer, x)[0], in_shardings=(None, place))
        program = forward.lower(layer, x).compile()
        got = jax.jit(lambda *args: graded(*args), in_shardings=(None, place))(
            layer, jax.device_put(x, place)
        )
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=2e-5 * np.max(np.abs(right)))
    counts, largest = collectives(program)
    assert counts == wanted
    assert largest < x.size
