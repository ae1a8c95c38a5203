"""Models whose layers lie in arrays of their own instead of stacked ones, for decoding on CPU."""

import copy
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxrec.ops.depth.remat import Apart


def for_decoding(model: Any) -> Any:
    """The model that steps on a single token are fastest with: on one CPU device with every stack
    of layers as `Apart`, so that no step copies weights, and elsewhere as it is.

    What asks for a stack, such as `init_state`, needs the model as it was. The weights are views of
    the same memory, where their length is a multiple of what XLA aligns to, and copies elsewhere.

    Args:
      model: a module; a stack of layers is an attribute all of whose parameters have one axis more
        than the logical axes they name.
    """
    devices = {device for x in jax.tree.leaves(model) for device in x.devices()}
    if [device.platform for device in devices] != ["cpu"]:
        return model
    new = copy.copy(model)
    for name, part in vars(model).items():
        if isinstance(part, nnx.Module) and _is_stacked(part):
            setattr(new, name, nnx.data(_apart(part)))
    return new


def _is_stacked(module: nnx.Module) -> bool:
    variables = jax.tree.leaves(
        nnx.state(module), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    named = [(x.ndim, x.get_metadata("axes", None)) for x in variables]
    return bool(named) and all(axes is not None and ndim == len(axes) + 1 for ndim, axes in named)


def _apart(module: nnx.Module) -> Apart:
    weights, structure = jax.tree.flatten(module)
    views = [np.asarray(x) for x in weights]
    # Of memory that is aligned, `device_put` takes a view; indexing a JAX array would copy.
    return Apart(
        tuple(
            jax.tree.unflatten(structure, [jax.device_put(x[i]) for x in views])
            for i in range(len(views[0]))
        )
    )
