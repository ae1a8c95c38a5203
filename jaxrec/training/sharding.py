"""Spreading a run over devices: the mesh, and where parameters, state and batches lie.

Names become mesh axes in `jaxrec.layers.axes`, the only table; this module applies it to whole
trees.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrec.errors import UserError, nearest
from jaxrec.layers.axes import LOGICAL_TO_MESH, MESH_AXES, parameter_axes

Tree = Any
T = TypeVar("T")
Model = Any  # a flax.nnx module or its state, real or abstract


def parse_mesh(spec: str) -> dict[str, int]:
    """Reads "data=2,model=4" as the size of every mesh axis; an axis left out has size 1.

    Raises:
      UserError: an unknown or repeated axis (names the nearest), or a size that is not a positive
        integer.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in MESH_AXES:
            known = ", ".join(MESH_AXES)
            raise UserError(
                f"mesh {spec!r}: no axis {name!r}.{nearest(name, MESH_AXES)} The axes are: {known}."
            )
        if name in sizes:
            raise UserError(f"mesh {spec!r}: the axis {name} is given twice.")
        if not (size.isascii() and size.isdigit() and int(size) > 0):
            raise UserError(
                f"mesh {spec!r}: expected a form like data=2,model=4 with sizes >= 1, got {part!r}."
            )
        sizes[name] = int(size)
    return {name: sizes.get(name, 1) for name in MESH_AXES}


def build_mesh(spec: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh of a run over the first devices: four axes, all of type Auto.

    Args:
      spec: as in `parse_mesh`. A mesh smaller than the machine uses its first devices.
      devices: the devices to choose from; None means all of them, over all hosts.

    Raises:
      UserError: the mesh needs more devices than there are, or leaves out devices of a run on
        several hosts.
    """
    sizes = parse_mesh(spec)
    devices = jax.devices() if devices is None else list(devices)
    needed = math.prod(sizes.values())
    if needed > len(devices):
        raise UserError(
            f"mesh {spec!r} needs {needed} devices and there are {len(devices)}."
            f" Choose sizes whose product is at most that, e.g. --mesh data={len(devices)}."
        )
    if jax.process_count() > 1 and needed != len(devices):
        raise UserError(
            f"mesh {spec!r} uses {needed} of {len(devices)} devices; a run on"
            f" {jax.process_count()} hosts must use all of them."
            f" Choose sizes whose product is {len(devices)}."
        )
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(
        tuple(sizes.values()), MESH_AXES, axis_types=kinds, devices=devices[:needed]
    )


def parameter_shardings(model: Model, mesh: Mesh) -> Tree:
    """Returns the sharding of every parameter, keyed like `nnx.to_pure_dict(nnx.state(model))`.

    Args:
      model: a module or its state, real or abstract (`nnx.eval_shape`). The metadata `axes` of a
        variable names its trailing dimensions; leading ones (stacked layers) and variables without
        `axes` are not split.
      mesh: the mesh.

    Raises:
      UserError: a dimension does not divide by the devices its axis is spread over.
    """

    def place(path: tuple[Any, ...], variable: nnx.Variable) -> NamedSharding:
        names = variable.get_metadata("axes", None) or ()
        parts = parameter_axes(names, variable.shape, mesh.shape)
        stacked = variable.ndim - len(names)
        for name, size, axes in zip(names, variable.shape[stacked:], parts[stacked:], strict=True):
            ways = math.prod(mesh.shape[axis] for axis in axes)
            if size % ways:
                where = "/".join(map(str, path))
                raise UserError(
                    f"parameter {where}: its axis {name} has size {size}, which does not divide by"
                    f" {'*'.join(axes)}={ways} of the mesh. Choose another mesh or another size."
                )
        return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in parts)))

    return _map_variables(place, model)


def stacked_axes(model: Model) -> Tree:
    """Returns the number of leading layer axes of every parameter: its rank less its `axes`."""

    def count(_: tuple[Any, ...], variable: nnx.Variable) -> int:
        names = variable.get_metadata("axes", None)
        return 0 if names is None else variable.ndim - len(names)

    return _map_variables(count, model)


def state_shardings(state: Tree, parameters: Tree, mesh: Mesh) -> Tree:
    """Returns the sharding of every leaf of a training state.

    A leaf lies where parameter p lies if its path ends in the path of p and it has p's rank: the
    parameters, their running average and the moments of any optimizer. Everything else, such as
    counters, is on every device.

    Args:
      state: training state, real or abstract, e.g. {"params": ..., "opt_state": ..., "ema": ...,
        "step": ...}.
      parameters: what `parameter_shardings` returned.
      mesh: the mesh.
    """
    by_path = {
        _names(path): place for path, place in jax.tree_util.tree_leaves_with_path(parameters)
    }
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path: Any, leaf: Any) -> NamedSharding:
        names = _names(path)
        for start in range(len(names)):
            found = by_path.get(names[start:])
            if found is not None and len(found.spec) == leaf.ndim:
                return found
        return replicated

    return jax.tree_util.tree_map_with_path(place, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a (b t) array: sequences over data and fsdp, time over seq."""
    return NamedSharding(mesh, PartitionSpec(LOGICAL_TO_MESH["batch"], LOGICAL_TO_MESH["time"]))


def is_virtual(mesh: Mesh) -> bool:
    """Whether the mesh is made of several CPU devices, which share one pool of threads.

    Two programs with collectives that run on them at once can each hold threads that the other
    waits for, for ever, until XLA ends the process; and so can two independent collectives of one
    program, unless the pool has more threads than there are devices (`PJRT_NPROC`).
    """
    return mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"


class OnMesh(Generic[T]):
    """A jitted function that runs on a mesh, which is the current one while it does.

    On a mesh that `is_virtual` it waits for its result.
    """

    def __init__(self, function: Callable[..., T], mesh: Mesh) -> None:
        self._function, self._mesh = function, mesh

    def __call__(self, *arguments: Any) -> T:
        """Runs it."""
        with jax.set_mesh(self._mesh):
            result = self._function(*arguments)
        return jax.block_until_ready(result) if is_virtual(self._mesh) else result

    def lower(self, *arguments: Any) -> Any:
        """As `jax.jit(...).lower`."""
        with jax.set_mesh(self._mesh):
            return self._function.lower(*arguments)  # type: ignore[attr-defined]


def on_one_device(tree: Tree, mesh: Mesh) -> Tree:
    """Moves arrays of a mesh that `is_virtual` to its first device; leaves others where they are.

    For programs that are no `OnMesh`, such as those that draw text.
    """
    return jax.device_put(tree, mesh.devices.flat[0]) if is_virtual(mesh) else tree


def check_batch(batch: int, time: int, mesh: Mesh) -> None:
    """Checks that a global batch of `batch` sequences of `time` tokens divides over the mesh.

    Raises:
      UserError: it does not.
    """
    for size, axis, word in (
        (batch, "batch", "sequences per batch"),
        (time, "time", "tokens per sequence"),
    ):
        axes = LOGICAL_TO_MESH[axis]
        ways = math.prod(mesh.shape[name] for name in axes)
        if size % ways:
            raise UserError(
                f"{size} {word} do not divide by {'*'.join(axes)}={ways} of the mesh."
                f" Choose a multiple of {ways}, or another mesh."
            )


def host_rows(batch: int, mesh: Mesh) -> slice:
    """Returns the rows of the global batch that the devices of this process need.

    Where they need rows that do not follow each other, those between are among them. Processes that
    share a row, because time or width is spread over them, both make it.
    """
    return slice(*_needed(batch, mesh))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a batch on the mesh.

    Args:
      batch: arrays (b t), the `host_rows` of the global batch.
      mesh: the mesh.

    Returns:
      Global arrays with `batch_sharding`.

    Raises:
      UserError: sequences or tokens do not divide by the mesh.
    """
    rows, time = next(iter(batch.values())).shape
    check_batch(_place_of(rows, mesh)[1], time, mesh)
    sharding = batch_sharding(mesh)
    return {name: _put(np.asarray(array), sharding) for name, array in batch.items()}


def placed(
    state: dict[str, Tree], model: Model, mesh: Mesh, *, by_row: tuple[str, ...] = ()
) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """Where the state of a run lies.

    Args:
      state: abstract training state, see `state_shardings`.
      model: whose parameters are in it, real or abstract.
      mesh: the mesh.
      by_row: entries of the state whose arrays are (b ...) and lie where the batch does.

    Returns:
      The abstract state with shardings, and the shardings alone.

    Raises:
      UserError: a parameter does not divide over the mesh.
    """
    places = state_shardings(state, parameter_shardings(model, mesh), mesh)
    rows = NamedSharding(mesh, PartitionSpec(LOGICAL_TO_MESH["batch"]))
    for name in by_row:
        places[name] = jax.tree.map(lambda _: rows, state[name])
    abstract = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
    )
    return abstract, places


def put_rows(batch: Tree, mesh: Mesh) -> Tree:
    """Puts arrays (b ...) on the mesh, their rows split over data and fsdp; each process passes the
    `host_rows` of the global batch.
    """
    place = NamedSharding(mesh, PartitionSpec(LOGICAL_TO_MESH["batch"]))
    return jax.tree.map(lambda x: _put(np.asarray(x), place), batch)


def _put(rows: np.ndarray, place: NamedSharding) -> jax.Array:
    """The global array of which this process has some rows."""
    first, total = _place_of(len(rows), place.mesh)

    def shard(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(total)
        return rows[(slice(start - first, stop - first), *index[1:])]

    return jax.make_array_from_callback((total, *rows.shape[1:]), place, shard)


def _place_of(rows: int, mesh: Any) -> tuple[int, int]:
    """The first of these `host_rows` in the global batch, and the rows of that."""
    ways = math.prod(mesh.shape[axis] for axis in LOGICAL_TO_MESH["batch"])
    start, stop = _needed(ways, mesh)
    total = rows * ways // (stop - start)
    return start * total // ways, total


def _needed(batch: int, mesh: Mesh) -> tuple[int, int]:
    """From the first to past the last row that devices of this process need."""
    place = NamedSharding(mesh, PartitionSpec(LOGICAL_TO_MESH["batch"]))
    needed = place.addressable_devices_indices_map((batch,)).values()
    ends = [index[0].indices(batch)[:2] for index in needed if index is not None]
    return min(start for start, _ in ends), max(stop for _, stop in ends)


def _map_variables(function: Callable[[tuple[Any, ...], nnx.Variable], Any], model: Model) -> Tree:
    """Applies function(path, variable) to all variables; a nested dictionary keyed by attribute."""
    state = model if isinstance(model, nnx.State) else nnx.state(model)
    tree: dict[Any, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = function(path, variable)
    return tree


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
