"""Which numbers of a state mix in one step, and finding out whether a cell does as it says.

A state (b ...) is seen as (b m n): groups of m numbers that mix, one group for each of n channels.
m is 1 for a diagonal Jacobian and the whole state for a dense one.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Kind = Literal["diagonal", "block", "dense"]
Step = Callable[[Any, Array, Any], Array]
LARGEST_BLOCK = 8  # of an axis of the state; a packed state is tried in at most four parts
DISAGREEMENT = 1e-3
"""A product that misses by more of its largest number is of another structure. Rounding makes 1e-6,
a neglected entry about 1."""


class Structure(NamedTuple):
    """How a state of some shape (without batch) is seen as (m n)."""

    kind: Kind
    shape: tuple[int, ...]
    before: int  # product of the axes before the one that mixes
    size: int  # m
    after: int  # product of those behind

    def split(self, h: Array) -> Array:
        """(... state) to (... m n)."""
        leading = h.shape[: h.ndim - len(self.shape)]
        h = h.reshape(*leading, self.before, self.size, self.after)
        return jnp.swapaxes(h, -3, -2).reshape(*leading, self.size, self.before * self.after)

    def joined(self, h: Array) -> Array:
        """(... m n) to (... state)."""
        leading = h.shape[:-2]
        h = h.reshape(*leading, self.size, self.before, self.after)
        return jnp.swapaxes(h, -3, -2).reshape(*leading, *self.shape)


def diagonal(shape: tuple[int, ...]) -> Structure:
    """Nothing mixes."""
    return Structure("diagonal", shape, 1, 1, math.prod(shape))


def dense(shape: tuple[int, ...]) -> Structure:
    """Everything mixes."""
    return Structure("dense", shape, 1, math.prod(shape), 1)


def blocks(shape: tuple[int, ...]) -> list[Structure]:
    """Ways in which a state can be groups: along its first axis or its last if it has several, and
    else in parts of equal length one behind the other.
    """
    found = []
    if len(shape) > 1:
        first, last = shape[0], shape[-1]
        if 1 < first <= LARGEST_BLOCK:
            found.append(Structure("block", shape, 1, first, math.prod(shape[1:])))
        if 1 < last <= LARGEST_BLOCK:
            found.append(Structure("block", shape, math.prod(shape[:-1]), last, 1))
    elif shape:
        for parts in (2, 3, 4):
            if shape[0] % parts == 0 and shape[0] > parts:
                found.append(Structure("block", shape, 1, parts, shape[0] // parts))
    return found


def of_matrices(matrices: tuple[int, ...], shape: tuple[int, ...]) -> Structure:
    """The structure of an analytic Jacobian's shape (without batch): that of the state, or (m m n).

    Raises:
      ValueError: it is neither.
    """
    if matrices == shape:
        return diagonal(shape)
    size, after = (*matrices, 0)[0], math.prod(matrices[2:])
    if len(matrices) < 2 or matrices[1] != size or size * after != math.prod(shape):
        raise ValueError(
            "newton_scan: an analytic Jacobian must be shaped as the state, (b ...), or (b m m n)"
            f" for m n numbers, got (b, {', '.join(map(str, matrices))}) for a state of"
            f" (b, {', '.join(map(str, shape))})."
        )
    return Structure("dense" if after == 1 else "block", shape, 1, size, after)


def find(kind: Kind | None, step: Step, params: Any, h: Array, x: Any, *, check: bool) -> Structure:
    """The structure that was declared, or the narrowest that fits.

    Args:
      kind: what was declared; None: find out.
      step: the cell.
      params: its parameters. Those that are being traced are replaced by random numbers.
      h: a state (b ...).
      x: inputs of one step, (b ...) each.
      check: whether to try what was declared.

    Raises:
      ValueError: the step is of another structure, mixes batch elements, or cannot be tried here.
    """
    shape = h.shape[1:]
    tried = {
        "diagonal": [diagonal(shape)],
        "block": blocks(shape),
        "dense": [dense(shape)],
        None: [diagonal(shape), *blocks(shape), dense(shape)],
    }[kind]
    if not tried:
        raise ValueError(
            "newton_scan: a block Jacobian needs a state (b m n) or (b n m) with 1 < m <="
            f" {LARGEST_BLOCK}, or (b m n) packed as (b m*n) with m <= 4; got shape {h.shape}."
        )
    if not check and kind is not None:
        return tried[0]
    narrower = [structure for structure in tried if structure.kind != "dense"]
    found = _probe(narrower, None, step, params, h, x)
    if found is None:  # the step cannot be run here
        if kind is None:
            raise ValueError(
                "newton_scan: the structure of the Jacobian cannot be found out here, because the"
                " step reads values that are being traced or is not finite at random arguments;"
                ' say jacobian="diagonal", "block" or "dense".'
            )
        return tried[0]
    talks, fits = found
    if talks:
        raise ValueError(
            "newton_scan: step must treat batch elements apart, but one of them changes another."
        )
    for structure, does in zip(narrower, fits, strict=True):
        if does:
            return structure
    if kind in ("dense", None):
        return tried[-1]
    raise ValueError(
        f"newton_scan: the step's Jacobian is not {kind} for a state of shape {h.shape}: a random"
        ' direction disagrees with it. Say jacobian="dense" or None (find out);'
        " or check=False if the parameters, which are random where they are traced, make it so."
    )


def check_analytic(
    jacobian: Step, structure: Structure, step: Step, params: Any, h: Array, x: Any
) -> None:
    """Compares an analytic Jacobian with the step's derivative where both can be run.

    Raises:
      ValueError: they disagree.
    """
    found = _probe([structure], jacobian, step, params, h, x)
    if found is not None and not found[1][0]:
        raise ValueError(
            "newton_scan: the analytic Jacobian disagrees with the derivative of step in a random"
            " direction. Pass check=False if that is meant."
        )


def _probe(
    structures: Sequence[Structure],
    jacobian: Step | None,
    step: Step,
    params: Any,
    h: Array,
    x: Any,
) -> tuple[bool, list[bool]] | None:
    """Whether batch elements talk, and which structures fit; None if that cannot be told."""
    rng = np.random.default_rng(0)

    def concrete(leaf: Any) -> Any:
        if not isinstance(leaf, jax.core.Tracer):
            return leaf
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return np.zeros(leaf.shape, leaf.dtype)
        return (0.5 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    params, x = jax.tree.map(concrete, (params, x))
    at, direction = (rng.normal(size=h.shape).astype(h.dtype) for _ in range(2))
    try:
        with jax.ensure_compile_time_eval():
            run = jax.jit(functools.partial(_disagreements, step, jacobian, tuple(structures)))
            finite, talks, errors = (np.asarray(y) for y in run(params, 0.5 * at, x, direction))
    except (jax.errors.TracerArrayConversionError, jax.errors.UnexpectedTracerError):
        return None
    if not finite:
        return None
    return bool(talks), [bool(error <= DISAGREEMENT) for error in errors]


def _disagreements(
    step: Step,
    jacobian: Step | None,
    structures: tuple[Structure, ...],
    params: Any,
    h: Array,
    x: Any,
    direction: Array,
) -> tuple[Array, Array, Array]:
    """Whether all is finite, whether batch elements talk, and by which part of the largest number
    each structure's product with a direction misses the derivative along it.
    """
    _, linear = jax.linearize(lambda h: step(params, h, x), h)
    want = linear(direction)
    scale = jnp.max(jnp.abs(want)) + jnp.finfo(h.dtype).tiny
    errors = [jnp.zeros((0,), h.dtype)]
    for structure in structures:
        if jacobian is not None:
            matrices = jacobian(params, h, x).reshape(
                h.shape[0], structure.size, structure.size, -1
            )
        else:
            basis = jnp.eye(structure.size, dtype=h.dtype)[:, None, :, None]
            each = jnp.broadcast_to(basis, (structure.size, *structure.split(h).shape))
            columns = jax.vmap(lambda e, s=structure: s.split(linear(s.joined(e))))(each)
            matrices = jnp.moveaxis(columns, 0, 2)
        got = jnp.einsum("bijn,bjn->bin", matrices, structure.split(direction))
        errors.append(jnp.max(jnp.abs(structure.joined(got) - want))[None] / scale)
    first = (jnp.arange(h.shape[0], dtype=jnp.int32) == 0).reshape(-1, *[1] * (h.ndim - 1))
    of_others = jnp.where(first, jnp.zeros((), h.dtype), linear(jnp.where(first, direction, 0)))
    talks = jnp.max(jnp.abs(of_others)) > DISAGREEMENT * scale
    return jnp.isfinite(scale), talks, jnp.concatenate(errors)
