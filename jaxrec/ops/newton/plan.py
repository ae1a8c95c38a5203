"""What one call of `newton_scan` has decided, and how its arrays are cut into windows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from jaxrec.ops.newton.iteration import Rules
from jaxrec.ops.newton.jacobian import Function
from jaxrec.ops.newton.structure import Step, Structure

Leaves = tuple[Array, ...]
Floats = tuple[Leaves, Leaves]  # of params and of x: what has a gradient
Others = tuple[Leaves, Leaves, Array | None, Array | None]  # the rest of both, reset and guess


class NewtonInfo(NamedTuple):
    """How a call ended; all are scalars."""

    iterations: Array  # int32: of the window that took most; 0 where steps were run one by one
    residual: Array  # largest relative residual that the iteration left, inf if it was not finite
    converged: Array  # bool: all steps of all windows settled by iteration alone
    fallbacks: Array  # int32: windows that were run sequentially because they did not settle

    @classmethod
    def exact(cls, dtype: Any = jnp.float32) -> "NewtonInfo":
        """Of steps that were run one by one."""
        nothing = jnp.zeros((), jnp.int32)
        return cls(nothing, jnp.zeros((), dtype), jnp.ones((), jnp.bool_), nothing)


class Split(NamedTuple):
    """Takes params and x apart into floats and others, and puts them together again."""

    structures: tuple[Any, Any]
    is_float: tuple[tuple[bool, ...], tuple[bool, ...]]

    @classmethod
    def of(cls, params: Any, x: Any) -> tuple["Split", Floats, tuple[Leaves, Leaves]]:
        """The split of these, with their floats and others."""
        flat = [jax.tree.flatten(tree) for tree in (params, x)]
        leaves = [tuple(jnp.asarray(leaf) for leaf in found) for found, _ in flat]
        kinds = [tuple(jnp.issubdtype(z.dtype, jnp.floating) for z in found) for found in leaves]

        def those(wanted: bool) -> Any:
            return tuple(
                tuple(z for z, kind in zip(*pair, strict=True) if kind == wanted)
                for pair in zip(leaves, kinds, strict=True)
            )

        split = cls((flat[0][1], flat[1][1]), (kinds[0], kinds[1]))
        return split, those(True), those(False)

    def join(self, floats: Any, others: Any) -> tuple[Any, Any]:
        """Params and x from their floats and others."""
        both = []
        for i in range(2):
            parts = {True: iter(floats[i]), False: iter(others[i])}
            leaves = [next(parts[kind]) for kind in self.is_float[i]]
            both.append(jax.tree.unflatten(self.structures[i], leaves))
        return both[0], both[1]


class Plan(NamedTuple):
    """The decisions, all known when tracing."""

    step: Step
    analytic: Step | None
    structure: Structure
    split: Split
    method: str
    window: int
    chunks: int | None  # of a window, in the kernel
    axis: str | None
    rules: Rules

    def function(self, params: Any, x: Any) -> Function:
        """The step at all times of x: states before (b t m n) to those after."""
        at_all_times = jax.vmap(self.step, in_axes=(None, 1, 1), out_axes=1)
        return lambda h: self.structure.split(at_all_times(params, self.structure.joined(h), x))

    def matrices(self, params: Any, x: Any) -> Function | None:
        """The analytic Jacobian at all times, (b t m n) to (b t m m n)."""
        if self.analytic is None:
            return None
        at_all_times = jax.vmap(self.analytic, in_axes=(None, 1, 1), out_axes=1)
        size = self.structure.size

        def jacobian(h: Array) -> Array:
            found = at_all_times(params, self.structure.joined(h), x)
            return found.reshape(*h.shape[:2], size, size, -1).astype(h.dtype)

        return jacobian

    def places(self) -> tuple[PartitionSpec, PartitionSpec]:
        """Spread over time; on every device."""
        return PartitionSpec(None, self.axis), PartitionSpec()

    def specs(self, floats: Floats, others: Others) -> tuple[Any, Any]:
        """Places of floats and others: params everywhere, the rest over time."""
        over_time, everywhere = self.places()

        def placed(params: Any, *rest: Any) -> Any:
            spread = (jax.tree.map(lambda _: over_time, tree) for tree in rest)
            return (jax.tree.map(lambda _: everywhere, params), *spread)

        return placed(*floats), placed(*others)

    def on_devices(self, run: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
        """`run` on each device's part; other axes of the mesh are left to the compiler."""
        assert self.axis is not None
        return jax.jit(  # only a compiled shard_map may leave axes to the compiler
            jax.shard_map(
                run,
                in_specs=in_specs,
                out_specs=out_specs,
                axis_names={self.axis},
                check_vma=False,
            )
        )


class _CutUp(NamedTuple):
    """(b t ...) to (windows b w ...), the last step repeated at the end where t does not divide."""

    time: int
    windows: int
    length: int

    def __call__(self, tree: Any) -> Any:
        return jax.tree.map(self._one, tree)

    def _one(self, x: Array) -> Array:
        rest = self.windows * self.length - self.time
        if rest:
            x = jnp.pad(x, [(0, 0), (0, rest)] + [(0, 0)] * (x.ndim - 2), mode="edge")
        x = x.reshape(x.shape[0], self.windows, self.length, *x.shape[2:])
        return jnp.swapaxes(x, 0, 1)

    def padding(self) -> Array:
        """Whether a step is such a repetition, bool (windows 1 w)."""
        steps = jnp.arange(self.windows * self.length, dtype=jnp.int32)
        return (steps >= self.time).reshape(self.windows, 1, self.length)


DEFAULT_WINDOW = 1024


def windows(time: int, window: int | None) -> int:
    """In how many windows of at most so many steps (None: the default) a sequence is solved."""
    return -(-time // (window or DEFAULT_WINDOW))


def windowed(time: int, window: int) -> tuple[_CutUp, Callable[[Any], Any]]:
    """Cuts arrays (b t ...) into windows of at most so many steps, and puts them together again.

    Windows are of equal length, so that fewer steps are repeated than there are windows.
    """
    count = windows(time, window)
    cut_up = _CutUp(time, count, -(-time // count))

    def put_together(tree: Any) -> Any:
        def one(x: Array) -> Array:
            x = jnp.swapaxes(x, 0, 1)
            return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :time]

        return jax.tree.map(one, tree)

    return cut_up, put_together
