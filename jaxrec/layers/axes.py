"""The one table from the axes of arrays to the axes of the device mesh.

A parameter or activation names its axes by what they mean ("embed", "heads"); this table says over
which mesh axes each meaning is split. Changing how a model is spread over devices means changing
this table and nothing else.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from jaxrec.errors import nearest

MESH_AXES = ("data", "fsdp", "seq", "model")
"""data: parameters copied; fsdp: in parts, gathered when used; seq: time; model: width."""

LOGICAL_TO_MESH: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "time": ("seq",),
    "embed": ("fsdp",),  # model width d of parameters; activations give fsdp to "batch"
    "mlp": ("model",),  # inner width e
    "heads": ("model",),  # heads, or heads times head width
    "kv_heads": ("model",),  # heads of keys and values that several heads of queries share
    "vocab": ("model",),
    "state": (),  # n of state-space layers
    "head": (),  # width inside one head
    "conv": (),  # taps of a short convolution
    "layers": (),  # stacked layers are run one after another, so every device needs all
}

WHOLE_IF_FEWER = ("kv_heads",)
"""Axes that every device holds whole where they are shorter than the devices are many."""


def mesh_axes(logical: tuple[str | None, ...]) -> tuple[tuple[str, ...], ...]:
    """Returns the mesh axes of each dimension; an axis goes to the first dimension that claims it.

    Args:
      logical: name of each dimension, or None for one that is never split.

    Raises:
      ValueError: a name is not in the table.
    """
    taken: set[str] = set()
    result = []
    for name in logical:
        if name is not None and name not in LOGICAL_TO_MESH:
            hint = nearest(name, LOGICAL_TO_MESH)
            raise ValueError(
                f"There is no axis {name!r} in LOGICAL_TO_MESH.{hint} Add it there, or use None."
            )
        claimed = tuple(axis for axis in LOGICAL_TO_MESH.get(name or "", ()) if axis not in taken)
        taken.update(claimed)
        result.append(claimed)
    return tuple(result)


def parameter_axes(
    logical: tuple[str | None, ...], shape: tuple[int, ...], sizes: Mapping[str, int]
) -> list[tuple[str, ...]]:
    """Returns the mesh axes of each dimension of a parameter, as `mesh_axes`, behind those of
    stacked layers, which are not split.

    Args:
      logical: names of the trailing dimensions.
      shape: of the parameter.
      sizes: of the axes of the mesh; others are left out.
    """
    stacked: list[tuple[str, ...]] = [()] * (len(shape) - len(logical))
    found = []
    for name, size, axes in zip(logical, shape[len(stacked) :], mesh_axes(logical), strict=True):
        axes = tuple(axis for axis in axes if axis in sizes)
        is_whole = name in WHOLE_IF_FEWER and size < math.prod(sizes[axis] for axis in axes)
        found.append(() if is_whole else axes)
    return stacked + found


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Asks the compiler to split x over the current mesh as the table says; returns x.

    Without a mesh (`jax.set_mesh`), on a mesh of one device, or inside `shard_map` over the axes in
    question it does nothing. A dimension that its mesh axes do not divide is left to the compiler.

    Args:
      x: an array.
      *logical: the meaning of each dimension of x, e.g. "batch", "time", "embed"; None = not split.
    """
    if len(logical) != x.ndim:
        raise ValueError(
            f"constrain: x has shape {x.shape}, expected one axis name each, got {logical}."
        )
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    usable = {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind == AxisType.Auto and size > 1
    }
    parts: list[object] = []
    for size, axes in zip(x.shape, mesh_axes(logical), strict=True):
        axes = tuple(axis for axis in axes if axis in usable)
        divides = size % math.prod(usable[axis] for axis in axes) == 0
        parts.append((axes or None) if divides else PartitionSpec.UNCONSTRAINED)
    if not usable:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*parts))


def time_axis(steps: int | None = None) -> str | None:
    """The mesh axis over which the compiler splits time on the current mesh; None if over none, or
    if it does not split so many steps evenly.
    """
    mesh = jax.sharding.get_abstract_mesh()
    for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True):
        if name in LOGICAL_TO_MESH["time"] and size > 1 and kind == AxisType.Auto:
            return None if steps is not None and steps % size else str(name)
    return None


def over_rows(run: Callable[..., Any], rows: jax.Array, *shared: jax.Array) -> Any:
    """run(rows, *shared), by each device for its own rows of the batch where the current mesh
    splits them evenly; every array that comes out has the rows in front.

    For what XLA cannot split: of a Fourier transform it gathers all rows on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if name in LOGICAL_TO_MESH["batch"] and kind == AxisType.Auto and size > 1
    }
    if not sizes or rows.shape[0] % math.prod(sizes.values()):
        return run(rows, *shared)
    split = PartitionSpec(tuple(sizes))
    mapped = jax.shard_map(
        run,
        in_specs=(split, *(PartitionSpec() for _ in shared)),
        out_specs=split,
        axis_names=set(sizes),
        check_vma=False,
    )
    return jax.jit(mapped)(
        rows, *shared
    )  # only a compiled shard_map may leave axes to the compiler


def merge_leading(x: jax.Array, kept: int) -> jax.Array:
    """Makes one axis of all but the last `kept`, for a product with weights.

    The gradient of the weights sums over those axes. On CPU a sum over one of them reads what is
    there, while for several XLA first writes a transposed copy. Where time is split over devices x
    is returned as it is: its parts are not in a row.
    """
    if time_axis() is not None:
        return x
    return x.reshape(-1, *x.shape[x.ndim - kept :])
