"""Weights gathered once before a loop: the same numbers, and nothing is sent while it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxrec.analysis.collectives import exchanges
from jaxrec.layers.gathered import with_whole_weights
from jaxrec.layers.mlp import GatedMLP
from jaxrec.training.sharding import build_mesh, parameter_shardings, parse_mesh

INIT = jax.nn.initializers.normal(0.3)
MESH = "data=2,fsdp=2,model=2"


def stack():
    """Two layers as one."""
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.vmap(lambda key: GatedMLP(8, 16, init=INIT, rngs=nnx.Rngs(key)))(keys)


def looped(blocks, rows, shared):
    """Three loops over the stack."""
    x, scale = rows["x"], shared

    def loop(x, _):
        return jax.lax.scan(lambda x, block: (x + block(x) * scale, None), x, blocks)

    x, _ = jax.lax.scan(loop, x, length=3)
    return {"x": x, "none": None}, jnp.exp(scale)


def loss(params, graph, x, scale):
    rows, shared = with_whole_weights(looped, nnx.merge(graph, params), {"x": x}, scale)
    return jnp.mean(rows["x"] ** 2) + shared


def compiled(mesh, batch):
    graph, params = nnx.split(stack())
    places = parameter_shardings(nnx.merge(graph, params), mesh)
    params = jax.device_put(nnx.to_pure_dict(params), places)
    x = np.random.default_rng(0).normal(size=(batch, 3, 8)).astype(np.float32)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp") if batch % 4 == 0 else None))
    arguments = params, jax.device_put(x, rows), jnp.float32(0.5)
    with jax.set_mesh(mesh):
        step = jax.jit(
            jax.value_and_grad(lambda params, x, scale: loss(params, graph, x, scale)),
            out_shardings=(None, places),
        )
        program = step.lower(*arguments).compile()
    return jax.device_get(program(*arguments)), program.as_text()


@pytest.mark.parametrize("batch", [8, 6])  # six rows do not divide over four devices
def test_values_and_gradients_are_those_of_one_device(batch):
    one, _ = compiled(build_mesh("data=1"), batch)
    many, _ = compiled(build_mesh(MESH), batch)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)


def test_weights_are_gathered_and_gradients_scattered_once():
    _, text = compiled(build_mesh(MESH), 8)
    found = exchanges(text, parse_mesh(MESH), loops=99)
    over_rows = [one for one in found if set(one.axes) & {"data", "fsdp"}]
    assert all(one.times == 1 for one in over_rows)
    gathers = [one for one in over_rows if one.kind == "all-gather"]
    scatters = [one for one in over_rows if one.kind == "reduce-scatter"]
    # The three matrices, of both layers at once: one device of a pair lacks a half of the half that
    # the width leaves it.
    assert [one.bytes for one in gathers] == [2 * 8 * 8 / 2 * 4] * 3
    assert [one.bytes for one in scatters] == [2 * 8 * 8 / 2 * 4] * 3
    # What the width is split over works inside the loops.
    assert any(one.times > 1 for one in found if one.axes == ("model",))
