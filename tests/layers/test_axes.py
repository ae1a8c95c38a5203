"""Logical axis names and the constraint they put on activations."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxrec.layers.axes import LOGICAL_TO_MESH, MESH_AXES, constrain, mesh_axes


def mesh(data: int = 1, fsdp: int = 1, seq: int = 1, model: int = 1) -> jax.sharding.Mesh:
    shape = (data, fsdp, seq, model)
    devices = jax.devices()[: data * fsdp * seq * model]
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


def test_the_table_names_only_mesh_axes():
    assert {axis for axes in LOGICAL_TO_MESH.values() for axis in axes} == set(MESH_AXES)


def test_a_mesh_axis_goes_to_the_first_dimension_that_claims_it():
    assert mesh_axes(("batch", "time", "embed")) == (("data", "fsdp"), ("seq",), ())
    assert mesh_axes(("embed", "mlp")) == (("fsdp",), ("model",))
    assert mesh_axes((None, "embed")) == ((), ("fsdp",))


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match=r"no axis 'embd'.*Did you mean embed"):
        mesh_axes(("embd",))


def test_without_a_mesh_nothing_happens():
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", "embed") is x
    with pytest.raises(ValueError, match=r"shape"):
        constrain(x, "batch")


def test_activations_are_split():
    with jax.set_mesh(mesh(data=2, seq=2, model=2)):
        y = jax.jit(lambda x: constrain(x * 2, "batch", "time", "mlp"))(jnp.ones((4, 6, 8)))
    assert y.sharding.shard_shape(y.shape) == (2, 3, 4)
    assert (y == 2).all()


def test_a_dimension_that_does_not_divide_is_left_alone():
    with jax.set_mesh(mesh(data=4, model=2)):
        y = jax.jit(lambda x: constrain(x * 2, "batch", "mlp"))(jnp.ones((3, 8)))
    assert (y == 2).all()
    assert y.sharding.shard_shape(y.shape)[1] == 4


def test_works_under_vmap_and_grad():
    def f(x):
        return jnp.sum(jax.vmap(lambda row: constrain(row * row, "mlp"))(x))

    with jax.set_mesh(mesh(data=4, model=2)):
        gradient = jax.jit(jax.grad(f))(jnp.ones((4, 8)))
    assert (gradient == 2).all()


def test_inside_shard_map_the_mapped_axes_are_left_alone():
    def body(x):
        return constrain(x * 2, "batch", "embed")

    with jax.set_mesh(mesh(data=8)):
        y = jax.jit(jax.shard_map(body, in_specs=P("data"), out_specs=P("data")))(jnp.ones((8, 4)))
    assert (y == 2).all()
