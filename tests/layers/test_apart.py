"""Layers in arrays of their own compute what stacked ones do."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers import apart
from jaxrec.models import huginn, recurrentgemma, rwkv
from jaxrec.ops.depth.remat import Apart

CONFIGS = {
    "huginn": dataclasses.replace(huginn.TINY, width=16, heads=2, mlp_width=16, vocab_size=7),
    "recurrentgemma": dataclasses.replace(
        recurrentgemma.TINY, width=16, recurrent_width=16, heads=2, mlp_width=16, vocab_size=7
    ),
    "rwkv": dataclasses.replace(rwkv.TINY, width=16, mlp_width=16, layers=2, vocab_size=7),
}
STACKS = {"huginn": {"prelude", "core", "coda"}, "recurrentgemma": {"groups"}, "rwkv": {"blocks"}}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_of_decoding_is_the_same(name):
    model = CONFIGS[name].build(rngs=nnx.Rngs(0))
    other = apart.for_decoding(model)
    assert {key for key, part in vars(other).items() if isinstance(part, Apart)} == STACKS[name]
    assert not any(isinstance(part, Apart) for part in vars(model).values())
    depth = None if model.config.mean_depth is None else model.config.mean_depth
    state = model.init_state(2, capacity=4, depth=depth)
    tokens = np.array([[3], [5]], np.int32)
    inputs = {} if depth is None else {"depth": depth}
    run = jax.jit(lambda model, state: model(tokens, state, **inputs))
    for got, want in zip(
        jax.tree.leaves(run(other, state)), jax.tree.leaves(run(model, state)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_weights_on_several_devices_stay_as_they_are():
    model = CONFIGS["rwkv"].build(rngs=nnx.Rngs(0))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.NamedSharding(mesh, jax.P())
    spread = jax.tree.map(lambda x: jax.device_put(x, everywhere), model)
    assert apart.for_decoding(spread) is spread


def test_weights_are_not_copied():
    model = dataclasses.replace(CONFIGS["rwkv"], width=64, mlp_width=64).build(rngs=nnx.Rngs(0))
    stack = model.blocks
    blocks = apart.for_decoding(model).blocks.steps

    def places(module):
        return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(module)]

    for i, block in enumerate(blocks):
        for x, place, begin in zip(
            jax.tree.leaves(block), places(block), places(stack), strict=True
        ):
            assert place == begin + i * x.nbytes
