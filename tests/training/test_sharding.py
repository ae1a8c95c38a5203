"""Meshes and the placement of parameters, optimizer state and batches, on eight virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxrec.errors import UserError
from jaxrec.training import sharding


class Block(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (width, 4)), axes=("embed", "mlp"))
        self.scale = nnx.Param(jnp.ones(width), axes=("embed",))
        self.free = nnx.Param(jnp.ones((3, 5)))


class Stack(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        keys = jax.random.split(rngs.params(), 3)
        self.blocks = jax.vmap(lambda key: Block(width, rngs=nnx.Rngs(key)))(keys)
        self.parts = nnx.List([nnx.Param(jnp.zeros((8, width)), axes=("vocab", "embed"))])


def abstract(width: int = 8) -> Stack:
    return nnx.eval_shape(lambda: Stack(width, rngs=nnx.Rngs(0)))


def test_parse_mesh_fills_in_all_axes():
    assert sharding.parse_mesh("model=4, data=2") == {"data": 2, "fsdp": 1, "seq": 1, "model": 4}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dta=2", "no axis 'dta'. Did you mean data? The axes are: data, fsdp, seq, model."),
        ("data=2,data=2", "the axis data is given twice"),
        ("data", "expected a form like data=2,model=4"),
        ("data=0", "sizes >= 1, got 'data=0'"),
        ("data=-1", "sizes >= 1, got 'data=-1'"),
    ],
)
def test_parse_mesh_says_what_is_wrong(spec, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        sharding.parse_mesh(spec)


def test_a_small_mesh_uses_the_first_devices():
    mesh = sharding.build_mesh("data=1")
    assert mesh.devices.ravel().tolist() == jax.devices()[:1]
    assert mesh.axis_names == ("data", "fsdp", "seq", "model")
    assert sharding.build_mesh("data=2,model=4").size == 8


def test_a_mesh_larger_than_the_machine_is_an_error():
    with pytest.raises(UserError, match=r"needs 16 devices and there are 8.*data=8"):
        sharding.build_mesh("data=4,model=4")


def test_parameters_follow_the_table():
    mesh = sharding.build_mesh("fsdp=2,model=4")
    model = abstract()
    placed = sharding.parameter_shardings(model, mesh)
    pure = nnx.to_pure_dict(nnx.state(model))
    assert jax.tree.structure(placed) == jax.tree.structure(pure)
    specs = jax.tree.map(lambda s: s.spec, placed)
    assert specs["blocks"]["kernel"] == P(None, ("fsdp",), ("model",))
    assert specs["blocks"]["scale"] == P(None, ("fsdp",))
    assert specs["blocks"]["free"] == P(None, None, None)
    assert specs["parts"][0] == P(("model",), ("fsdp",))
    values = nnx.to_pure_dict(nnx.state(Stack(8, rngs=nnx.Rngs(0))))
    chunk = jax.device_put(values, placed)["blocks"]["kernel"].addressable_shards[0].data
    assert chunk.shape == (3, 4, 1)


def test_a_width_that_does_not_divide_is_named():
    mesh = sharding.build_mesh("fsdp=8")
    with pytest.raises(
        UserError, match=r"parameter blocks/kernel: its axis embed has size 12.*fsdp=8"
    ):
        sharding.parameter_shardings(abstract(width=12), mesh)


def test_stacked_axes_are_counted_from_the_metadata():
    stacked = sharding.stacked_axes(abstract())
    assert stacked == {"blocks": {"kernel": 1, "scale": 1, "free": 0}, "parts": {0: 0}}


def test_optimizer_state_and_average_lie_with_their_parameter():
    mesh = sharding.build_mesh("fsdp=2,model=4")
    model = abstract()
    placed = sharding.parameter_shardings(model, mesh)
    params = nnx.to_pure_dict(nnx.state(model))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = {
        "params": params,
        "opt_state": jax.eval_shape(optimizer.init, params),
        "ema": params,
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    result = sharding.state_shardings(state, placed, mesh)
    assert result["params"] == placed and result["ema"] == placed
    adam = result["opt_state"][1][0]
    assert adam.mu == placed and adam.nu == placed
    assert adam.count.spec == P() and result["step"].spec == P()


def test_state_without_average():
    mesh = sharding.build_mesh("data=8")
    result = sharding.state_shardings({"ema": None, "step": jnp.int32(0)}, {}, mesh)
    assert result["ema"] is None


def test_batches_are_split_over_data_and_time():
    mesh = sharding.build_mesh("data=2,fsdp=2,seq=2")
    tokens = np.arange(4 * 6, dtype=np.int32).reshape(4, 6)
    put = sharding.put_batch({"inputs": tokens}, mesh)["inputs"]
    np.testing.assert_array_equal(np.asarray(put), tokens)
    assert put.addressable_shards[0].data.shape == (1, 3)
    with pytest.raises(UserError, match=r"6 sequences per batch do not divide by data\*fsdp=4"):
        sharding.put_batch({"inputs": np.zeros((6, 6), np.int32)}, mesh)
    with pytest.raises(UserError, match=r"5 tokens per sequence do not divide by seq=2"):
        sharding.put_batch({"inputs": np.zeros((4, 5), np.int32)}, mesh)
