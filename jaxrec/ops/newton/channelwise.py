"""A step as arithmetic between the numbers of one channel, for kernels.

The step is traced with a single channel and a single batch element. Every array of that trace has
few numbers, and each is kept as one tile: an array of any shape, one entry for each chunk of time
and channel that a program holds. Slices, reshapes and small products then are Python's bookkeeping
over tiles, and nothing is left but elementwise operations between tiles of equal shape, which every
kind of kernel has.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax import lax

Tiles = np.ndarray
"""An array of dtype object whose entries are arrays of one shape, or numbers."""
ELEMENTWISE = frozenset(
    "abs add and clamp convert_element_type cos div eq erf exp exp2 ge gt integer_pow le log"
    " logistic lt max min mul ne neg not or rem round rsqrt select_n sign sin square sub tanh"
    " xor".split()
)
"""What kernels for GPUs and for TPUs both have."""
REPLACED: dict[str, Callable[..., Any]] = {
    "add_any": lax.add,
    "copy": lambda x: x,
    "is_finite": lambda x: jnp.abs(x) <= float(jnp.finfo(x.dtype).max),
    "stop_gradient": lambda x: x,
    "sqrt": lambda x, **_: jnp.where(x > 0, x * lax.rsqrt(x), x),
}
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
"""Primitives that run a jaxpr, and under which name."""


class NotChannelwiseError(ValueError):
    """A step cannot be taken apart into channels."""


def channelwise(jaxpr: Any, constants: Sequence[Any]) -> Callable[[Sequence[Tiles]], list[Tiles]]:
    """A jaxpr as a function of tiles.

    Args:
      jaxpr: of a function of small arrays.
      constants: of the jaxpr, arrays of known numbers.

    Raises:
      NotChannelwiseError: it has an operation that does not come down to elementwise ones.
    """
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in CALLS:
            inner = equation.params[CALLS[name]]
            channelwise(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()))
        elif name not in ("split", *ELEMENTWISE, *REPLACED, *ARRANGED):
            raise NotChannelwiseError(f"it has the operation {name}")
    known = [_numbers(np.asarray(x)) for x in constants]

    def run(arguments: Sequence[Tiles]) -> list[Tiles]:
        values = dict(zip(jaxpr.constvars, known, strict=True))
        values |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Tiles:
            if isinstance(atom, jax.extend.core.Literal):
                return _numbers(np.asarray(atom.val, jnp.result_type(atom.aval)))
            return values[atom]

        for equation in jaxpr.eqns:
            found = _apply(equation, [read(atom) for atom in equation.invars])
            values |= dict(zip(equation.outvars, found, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    return run


def tiles(entries: Sequence[Any], shape: tuple[int, ...]) -> Tiles:
    """Entries in reading order as an array of tiles."""
    found = np.empty(len(entries), object)
    for i, entry in enumerate(entries):
        found[i] = entry
    return found.reshape(shape)


def _numbers(x: np.ndarray) -> Tiles:
    """Known numbers, which stay numbers of NumPy among each other."""
    return tiles(list(x.reshape(-1)), x.shape)


def _apply(equation: Any, arguments: list[Tiles]) -> list[Tiles]:
    name, options = equation.primitive.name, equation.params
    if name in CALLS:
        inner = options[CALLS[name]]
        run = channelwise(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()))
        return run(arguments)
    if name == "split":
        ends = np.cumsum(options["sizes"])[:-1]
        return np.split(arguments[0], ends, options["axis"])
    if name in ARRANGED:
        return [ARRANGED[name](*arguments, **options)]
    return [_elementwise(equation.primitive, arguments, options)]


def _elementwise(primitive: Any, arguments: list[Tiles], options: dict[str, Any]) -> Tiles:
    operation = REPLACED.get(primitive.name, primitive.bind)
    shape = np.broadcast_shapes(*(x.shape for x in arguments))
    each = zip(*(np.broadcast_to(x, shape).reshape(-1) for x in arguments), strict=True)
    return tiles([_one(operation, entries, options) for entries in each], shape)


def _one(operation: Callable[..., Any], entries: Sequence[Any], options: dict[str, Any]) -> Any:
    if all(isinstance(x, np.generic) for x in entries):
        with jax.ensure_compile_time_eval():
            return np.asarray(operation(*map(jnp.asarray, entries), **options))[()]
    shape = np.broadcast_shapes(*(jnp.shape(x) for x in entries))
    alike = [
        jnp.full(shape, x.item(), x.dtype) if isinstance(x, np.generic) else x for x in entries
    ]
    return operation(*alike, **options)


def _broadcast(x: Tiles, *, shape: Any, broadcast_dimensions: Any, **_: Any) -> Tiles:
    expanded = [1] * len(shape)
    for axis, size in zip(broadcast_dimensions, x.shape, strict=True):
        expanded[axis] = size
    return np.broadcast_to(x.reshape(expanded), shape)


def _slice(x: Tiles, *, start_indices: Any, limit_indices: Any, strides: Any) -> Tiles:
    steps = strides or [1] * x.ndim
    return x[tuple(map(slice, start_indices, limit_indices, steps))]


def _product(left: Tiles, right: Tiles, *, dimension_numbers: Any, **_: Any) -> Tiles:
    """A small product of matrices: batch axes first, then what is left of both."""
    (of_left, of_right), (batch_left, batch_right) = dimension_numbers
    letters = itertools.count()
    batch = [next(letters) for _ in batch_left]
    summed = [next(letters) for _ in of_left]

    def names(x: Tiles, own_batch: Any, own_summed: Any) -> list[int]:
        found = dict(zip(own_batch, batch, strict=True)) | dict(
            zip(own_summed, summed, strict=True)
        )
        return [found[i] if i in found else next(letters) for i in range(x.ndim)]

    left_names = names(left, batch_left, of_left)
    right_names = names(right, batch_right, of_right)
    free = [i for i in (*left_names, *right_names) if i not in (*batch, *summed)]
    sizes = dict(zip(left_names, left.shape, strict=True)) | dict(
        zip(right_names, right.shape, strict=True)
    )
    shape = tuple(sizes[i] for i in (*batch, *free))
    entries = []
    for place in np.ndindex(*shape):
        at = dict(zip((*batch, *free), place, strict=True))
        total = None
        for inner in np.ndindex(*(sizes[i] for i in summed)):
            at |= dict(zip(summed, inner, strict=True))
            pair = left[tuple(at[i] for i in left_names)], right[tuple(at[i] for i in right_names)]
            term = _one(lax.mul, pair, {})
            total = term if total is None else _one(lax.add, (total, term), {})
        entries.append(total)
    return tiles(entries, shape)


def _folded(operation: Callable[[Any, Any], Any]) -> Callable[..., Tiles]:
    def fold(x: Tiles, *, axes: Any, **_: Any) -> Tiles:
        rest = tuple(size for i, size in enumerate(x.shape) if i not in axes)
        first, *others = np.moveaxis(x, axes, range(len(axes))).reshape(-1, math.prod(rest))
        total = list(first)
        for other in others:
            total = [_one(operation, pair, {}) for pair in zip(total, other, strict=True)]
        return tiles(total, rest)

    return fold


ARRANGED: dict[str, Callable[..., Tiles]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda *parts, dimension: np.concatenate(parts, axis=dimension),
    "dot_general": _product,
    "expand_dims": lambda x, *, dimensions: np.expand_dims(x, dimensions),
    "reduce_max": _folded(lax.max),
    "reduce_min": _folded(lax.min),
    "reduce_sum": _folded(lax.add),
    "reshape": lambda x, *, new_sizes, **_: x.reshape(new_sizes),
    "rev": lambda x, *, dimensions: np.flip(x, dimensions),
    "slice": _slice,
    "stack": lambda *parts, axis: np.stack(parts, axis),
    "squeeze": lambda x, *, dimensions: np.squeeze(x, dimensions),
    "transpose": lambda x, *, permutation: np.transpose(x, permutation),
}
"""Operations that arrange tiles, or come down to a few sums of them."""
