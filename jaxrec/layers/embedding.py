"""Tokens to vectors and back."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer

from jaxrec.layers.axes import constrain, merge_leading


class Embedding(nnx.Module):
    """A table of one vector per token, also usable as the output head that it is tied to."""

    def __init__(self, vocab_size: int, width: int, *, init: Initializer, rngs: nnx.Rngs):
        table = init(rngs.params(), (vocab_size, width), jnp.float32)
        self.table = nnx.Param(table, axes=("vocab", "embed"))

    def __call__(self, tokens: Array) -> Array:
        """Looks up int (b t); returns (b t d)."""
        # Gathered when used, like every weight. Left to the compiler, each device reads its part of
        # the width for all tokens of the batch, and to get its own tokens' vectors from there the
        # SPMD partitioner falls back on all of them on every device ("involuntary full
        # rematerialization") where both "data" and "fsdp" split the batch.
        return constrain(self.table[...], "vocab", None)[tokens]

    def logits(self, x: Array, *, soft_cap: float | None = None) -> Array:
        """Scores of every token for x (b t d): (b t vocab), accumulated and returned in float32;
        with a soft cap, cap * tanh(score / cap).
        """
        table = self.table[...]
        y = jnp.einsum(
            "...d,vd->...v",
            merge_leading(x, 1).astype(table.dtype),
            table,
            preferred_element_type=jnp.float32,
        )
        if soft_cap is not None:
            y = soft_cap * jnp.tanh(y / soft_cap)
        return constrain(y.reshape(*x.shape[:-1], table.shape[0]), "batch", "time", "vocab")
