"""Coordinates of position and loop, given to a state anew before every loop.

    add       x <- x + P_{p + start} + E_t
    concat    x <- W [x ; P_{p + start} ; E_t]

P is a sinusoid (see `ops.sinusoid`), E the same sinusoid at t or a learned table. A start above
zero shows positions in training that no sequence in it reaches by its length.

Dehghani et al., Universal transformers (2018), arXiv:1807.03819, equation 6; options as in its
original.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxrec.layers.linear import Linear, uniform
from jaxrec.ops.sinusoid import sinusoid

StepCoordinates = Literal["learned", "sinusoid"]
Join = Literal["add", "concat"]
Start = Literal["zero", "random", "step"]


class Coordinates(nnx.Module):
    """The coordinates of a stack that loops so many steps. With the start "step" positions of loop
    t of T are shifted by t/T of the length; "random" leaves the shift to whoever calls.

    The table has deviation 1/sqrt(d) and counts sqrt(d) times, as an embedding does.
    """

    def __init__(
        self,
        width: int,
        steps: int,
        *,
        step: StepCoordinates = "learned",
        join: Join = "add",
        start: Start = "zero",
        rngs: nnx.Rngs,
    ):
        init = jax.nn.initializers.normal(width**-0.5)
        self.table = (
            nnx.Param(init(rngs.params(), (steps, width), jnp.float32), axes=(None, "embed"))
            if step == "learned"
            else None
        )
        self.join = (
            Linear(
                3 * width,
                width,
                init=uniform((6 / (4 * width)) ** 0.5),
                axes=(None, "embed"),
                rngs=rngs,
            )
            if join == "concat"
            else None
        )
        self.start, self.width, self.steps = start, width, steps

    def positions(self, position: Array, x: Array) -> Array:
        """P (b t d) of positions int32 (b t), in the dtype of x."""
        return sinusoid(position, self.width).astype(x.dtype)

    def __call__(self, x: Array, position: Array, fixed: Array, t: Array, length: int) -> Array:
        """Gives x (b t d) its coordinates in loop t.

        Args:
          x: the state.
          position: int32 (b t).
          fixed: of `positions`, which is the same in all loops unless the start is "step".
          t: int32 (), which loop.
          length: of the sequence, by which "step" shifts.
        """
        if self.start == "step":
            fixed = self.positions(position + length * t // self.steps, x)
        if self.table is None:
            step = sinusoid(t, self.width).astype(x.dtype)
        else:
            step = self.table[...][t].astype(x.dtype) * jnp.asarray(self.width**0.5, x.dtype)
        if self.join is None:
            return x + fixed + step[None, None]
        return self.join(
            jnp.concatenate([x, fixed, jnp.broadcast_to(step[None, None], x.shape)], axis=-1)
        )
