"""A loop over weights that lie in parts on several devices: gathered once, before the loop.

Left to the compiler, a block that is looped n times is gathered over "fsdp" n times and once more
in each loop of the gradient, and what each of these loops adds to the gradient is summed over all
devices that hold other rows of the batch. Here it is one all-gather before the first loop and one
reduce-scatter behind the last, whatever n is; the price is that every device holds the whole block,
and the whole of its gradient, while the loop runs.

Where the parts come from: Rajbhandari et al., ZeRO (2019), arXiv:1910.02054, section 5.3.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxrec.layers.axes import LOGICAL_TO_MESH, parameter_axes

Axes = tuple[str, ...]  # of the mesh


def with_whole_weights(
    run: Callable[[Any, Any, Any], tuple[Any, Any]],
    weights: Any,
    rows: Any,
    shared: Any,
) -> tuple[Any, Any]:
    """Calls run(weights, rows, shared) on every device's rows, with all of the weights.

    Without a mesh, on one that does not split the batch, or where the rows do not divide over it,
    this is the call itself. Axes of the mesh other than those of the batch are left to the
    compiler.

    Args:
      run: rows in, rows out; no row may look at another one, and nothing may be drawn for rows from
        a key that they share, since every device would draw the same. What it closes over must not
        be traced.
      weights: modules, a pytree; their variables name their axes.
      rows: pytree of arrays (b ...).
      shared: pytree of arrays that are the same for all rows.

    Returns:
      What `run` returned: a pytree of arrays (b ...), and one of arrays that are the same whatever
      the rows are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind == AxisType.Auto and size > 1
    }
    over = tuple(name for name in LOGICAL_TO_MESH["batch"] if name in automatic)
    batch = jax.tree.leaves(rows)[0].shape[0]
    if not over or batch % math.prod(automatic[name] for name in over):
        return run(weights, rows, shared)

    leaves, structure = jax.tree.flatten(weights)
    variables = jax.tree.leaves(weights, is_leaf=lambda x: isinstance(x, nnx.Variable))
    parts = [_parts(variable, automatic) for variable in variables]
    copies = [_copy_for_each(x, each, over) for x, each in zip(leaves, parts, strict=True)]

    def on_each(copies: list[jax.Array], rows: Any, shared: Any) -> tuple[Any, Any]:
        own = [jnp.squeeze(copy, 0) for copy in copies]
        return run(jax.tree.unflatten(structure, own), rows, shared)

    one_each, everywhere = PartitionSpec(over), PartitionSpec()
    mapped = jax.shard_map(
        on_each,
        in_specs=(one_each, one_each, everywhere),
        out_specs=(one_each, everywhere),
        axis_names=set(over),
        check_vma=False,
    )
    # Only a compiled shard_map may leave axes to the compiler.
    return jax.jit(mapped)(copies, rows, shared)


def _parts(variable: nnx.Variable, sizes: dict[str, int]) -> tuple[Axes, ...]:
    names = variable.get_metadata("axes", None) or ()
    return tuple(parameter_axes(names, variable.shape, sizes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _copy_for_each(x: jax.Array, parts: tuple[Axes, ...], over: Axes) -> jax.Array:
    """A weight as one copy for each device with rows of its own, along a new leading axis.

    So the gradient of every copy stays where it is made until all of them are added up, here. The
    axes that split the weight further take part, since the compiler would undo their split for a
    gather that leaves them to it.

    Args:
      x: the weight.
      parts: over which axes of the mesh each dimension lies.
      over: axes of the mesh that split the batch.
    """

    def copy(x: jax.Array) -> jax.Array:
        for dimension, axes in _gathered(parts, over):
            x = lax.all_gather(x, axes, axis=dimension, tiled=True)
        return x[None]

    return _on_each(copy, parts, over, PartitionSpec(*parts), _of_copies(parts, over))(x)


def _forward(x: jax.Array, parts: tuple[Axes, ...], over: Axes) -> tuple[jax.Array, None]:
    return _copy_for_each(x, parts, over), None


def _backward(parts: tuple[Axes, ...], over: Axes, _: None, dy: jax.Array) -> tuple[jax.Array]:
    def add(dy: jax.Array) -> jax.Array:
        # In float32: thousands of terms in bfloat16 would leave no digits.
        x, rest = jnp.squeeze(dy, 0).astype(jnp.float32), set(over)
        for dimension, axes in _gathered(parts, over):
            x = lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True)
            rest -= set(axes)
        return lax.psum(x, tuple(rest)).astype(dy.dtype) if rest else x.astype(dy.dtype)

    return (_on_each(add, parts, over, _of_copies(parts, over), PartitionSpec(*parts))(dy),)


_copy_for_each.defvjp(_forward, _backward)


def _on_each(
    function: Callable[[jax.Array], jax.Array],
    parts: tuple[Axes, ...],
    over: Axes,
    in_specs: PartitionSpec,
    out_specs: PartitionSpec,
) -> Callable[[jax.Array], jax.Array]:
    names = set(over).union(*parts)
    mapped = jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False
    )
    return jax.jit(mapped)


def _of_copies(parts: tuple[Axes, ...], over: Axes) -> PartitionSpec:
    return PartitionSpec(over, *(tuple(a for a in axes if a not in over) for axes in parts))


def _gathered(parts: tuple[Axes, ...], over: Axes) -> list[tuple[int, Axes]]:
    """Dimensions that lie over axes of the batch, with these axes."""
    found = [(i, tuple(a for a in axes if a in over)) for i, axes in enumerate(parts)]
    return [(i, axes) for i, axes in found if axes]
