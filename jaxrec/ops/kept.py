"""What a gradient that computes most things again keeps: the results of recurrences.

They are no larger than what they are made of, and dear to make. A scan names its results and the
states that its gradient reads; a policy of `jax.checkpoint` then finds them.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

T = TypeVar("T")
NAME = "result of a recurrence"


def kept(x: T) -> T:
    """x (any pytree), under the name by which `PRODUCTS_AND_KEPT` knows it."""
    return jax.tree.map(_named, x)


def _named(x: Array) -> Array:
    if jnp.iscomplexobj(x):  # of which JAX 0.10 cannot keep the whole: it rounds to reals
        return lax.complex(checkpoint_name(x.real, NAME), checkpoint_name(x.imag, NAME))
    return checkpoint_name(x, NAME)


PRODUCTS_AND_KEPT = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(NAME),
)
"""A policy: the results of products with weights, and what is `kept`."""
