"""A scan whose backward pass recomputes instead of remembering.

Chen et al., Training deep nets with sublinear memory cost (2016), arXiv:1604.06174.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
from jax import lax

from jaxrec.ops import notes
from jaxrec.ops.kept import PRODUCTS_AND_KEPT

T = TypeVar("T")
RematPolicy = Literal["none", "dots", "block", "sqrt"]
REMAT_POLICIES: tuple[RematPolicy, ...] = get_args(RematPolicy)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Apart:
    """Inputs of the steps of a scan as one pytree each, instead of one whose leaves are stacked.

    A step then reads arrays of its own. XLA on CPU copies what a step takes out of a stack: for a
    step on a single token, all weights once more.
    """

    steps: tuple[Any, ...]

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        """The steps."""
        return self.steps, None

    @classmethod
    def tree_unflatten(cls, _: None, steps: tuple[Any, ...]) -> "Apart":
        """The same of other leaves."""
        return cls(tuple(steps))


def remat_scan(
    body: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any,
    *,
    length: int | None = None,
    remat: RematPolicy = "none",
) -> tuple[Any, Any]:
    """`lax.scan(body, carry, xs, length)` with a choice of what its gradient stores.

    Args:
      body: (carry, x) -> (carry, y), as for `lax.scan`.
      carry: initial carry, any pytree.
      xs: pytree scanned over its leading axis, or None when `length` is given. Parts of it may be
        `Apart`: then the steps are written out one by one, and a gradient stores everything.
      length: number of steps; needed when xs has no leaves.
      remat: "none" stores every intermediate of every step; "dots" stores the carry and the results
        of matrix products with weights and of recurrences in time of every step and recomputes the
        rest; "block" stores the carry of every step and recomputes one step at a time; "sqrt"
        stores the carry of every sqrt(n)-th step and recomputes one such stretch at a time:
        O(sqrt n) carries for one more forward pass.

    Returns:
      The last carry and the stacked ys.

    Raises:
      ValueError: the policy is unknown.
    """
    _check(remat)
    body, settle = notes.through(body)
    carry, ys = _scan(body, carry, xs, length, remat)
    return carry, settle(ys)


def remat_step(step: Callable[..., T], *, remat: RematPolicy) -> Callable[..., T]:
    """`step` as one step of a `remat_scan`, for steps that no scan can hold.

    Args:
      step: a function of pytrees.
      remat: as of `remat_scan`; "sqrt" is "block" here, a stretch of one.

    Raises:
      ValueError: the policy is unknown.
    """
    _check(remat)
    if remat == "none":
        return step
    return notes.around(functools.partial(jax.checkpoint, policy=_policy(remat)), step)


def _check(remat: RematPolicy) -> None:
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat must be one of {REMAT_POLICIES}, got {remat!r}.")


def _policy(remat: RematPolicy) -> Callable[..., Any] | None:
    """What a step keeps besides its inputs, as `jax.checkpoint` has it."""
    return PRODUCTS_AND_KEPT if remat == "dots" else None


def _scan(
    body: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any,
    length: int | None,
    remat: RematPolicy,
) -> tuple[Any, Any]:
    if any(map(_is_apart, jax.tree.leaves(xs, is_leaf=_is_apart))):
        return _one_by_one(body, carry, xs)
    leaves = jax.tree.leaves(xs)
    steps = length if not leaves else leaves[0].shape[0]
    assert steps is not None, "remat_scan needs xs or length"
    if remat == "none":
        return lax.scan(body, carry, xs, length=steps)
    # The loop already keeps XLA from merging the recomputation with the first pass.
    one_step = jax.checkpoint(body, prevent_cse=False, policy=_policy(remat))
    stretch = max(1, int(steps**0.5))
    if remat != "sqrt" or stretch == 1:
        return lax.scan(one_step, carry, xs, length=steps)

    whole = steps // stretch * stretch
    head = jax.tree.map(lambda x: x[:whole].reshape(-1, stretch, *x.shape[1:]), xs)
    tail = jax.tree.map(lambda x: x[whole:], xs)

    @jax.checkpoint
    def run_stretch(carry: Any, xs: Any) -> tuple[Any, Any]:
        return lax.scan(one_step, carry, xs, length=stretch)

    carry, ys = lax.scan(run_stretch, carry, head, length=steps // stretch)
    ys = jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys)
    if whole == steps:
        return carry, ys
    carry, last_ys = lax.scan(one_step, carry, tail, length=steps - whole)
    return carry, jax.tree.map(lambda y, last: jnp.concatenate([y, last]), ys, last_ys)


def last_of(xs: Any) -> Any:
    """The inputs of the last step of a scan over xs, which may be `Apart`."""
    return xs.steps[-1] if _is_apart(xs) else jax.tree.map(lambda x: x[-1], xs)


def _is_apart(x: Any) -> bool:
    return isinstance(x, Apart)


def _one_by_one(
    body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any
) -> tuple[Any, Any]:
    parts, structure = jax.tree.flatten(xs, is_leaf=_is_apart)
    count = next(len(part.steps) for part in parts if _is_apart(part))
    ys = []
    for i in range(count):
        x = [part.steps[i] if _is_apart(part) else part[i] for part in parts]
        carry, y = body(carry, jax.tree.unflatten(structure, x))
        ys.append(y)
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *ys)
