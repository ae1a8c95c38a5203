"""Affine maps, and how their weights begin."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jaxrec.layers.axes import merge_leading


def truncated_normal(stddev: float) -> Initializer:
    """Normal with this deviation before it is cut at three deviations, as most published models use
    it.
    """
    return jax.nn.initializers.truncated_normal(stddev, lower=-3.0, upper=3.0)


CUT_DEVIATION = 0.87962566103423978
"""Deviation of a normal variable of deviation 1 that is cut at two."""


def normal_cut_at_two(stddev: float) -> Initializer:
    """Normal, cut at two deviations, and as much wider that this is its deviation after the cut."""
    return jax.nn.initializers.truncated_normal(stddev / CUT_DEVIATION)


def uniform(limit: float) -> Initializer:
    """Uniform between -limit and limit; PyTorch's linear maps and convolutions begin so, with the
    limit 1 / sqrt(inputs).
    """

    def init(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit, out_sharding=out_sharding)

    return init


class Linear(nnx.Module):
    """y = x W + b over the last axis, computed in the dtype of W.

    W maps (d) to one or several axes: `outputs` may be (3, h, k), say, so that sharding can name
    each of them.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int | tuple[int, ...],
        *,
        init: Initializer,
        axes: tuple[str | None, ...],
        bias: bool = False,
        bias_init: Initializer = jax.nn.initializers.zeros,
        rngs: nnx.Rngs,
    ):
        shape = (outputs,) if isinstance(outputs, int) else outputs
        self.kernel = nnx.Param(init(rngs.params(), (inputs, *shape), jnp.float32), axes=axes)
        self.bias = (
            nnx.Param(bias_init(rngs.params(), shape, jnp.float32), axes=axes[1:]) if bias else None
        )

    def __call__(self, x: Array) -> Array:
        """Maps (... d) to (... outputs)."""
        kernel = self.kernel[...]
        y = jnp.tensordot(merge_leading(x, 1).astype(kernel.dtype), kernel, axes=1)
        y = y.reshape(*x.shape[:-1], *kernel.shape[1:])
        if self.bias is None:
            return y
        bias = self.bias[...].astype(y.dtype)
        return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def by_block(x: Array, kernel: Array, dtype: DTypeLike | None = None) -> Array:
    """The products of blocks (... h i) with matrices of their own, (h i j): (... h j), in `dtype`
    or that of the arguments.

    Blocks are moved in front first: of "...hi,hij->...hj" XLA on CPU makes a product whose result
    lies transposed, and this and what reads it take twice as long.
    """
    first = jnp.moveaxis(merge_leading(x, 2), -2, 0)
    y = jnp.einsum("h...i,hij->h...j", first, kernel, preferred_element_type=dtype)
    return jnp.moveaxis(y, 0, -2).reshape(*x.shape[:-1], kernel.shape[-1])


class BlockLinear(nnx.Module):
    """y = x W + b with a block-diagonal W: the width is cut into `blocks` and each is mapped by
    itself.
    """

    def __init__(
        self, width: int, blocks: int, *, init: Initializer, rngs: nnx.Rngs, bias: bool = True
    ):
        if width % blocks:
            raise ValueError(f"BlockLinear: width {width} does not divide into {blocks} blocks.")
        size = width // blocks
        kernel = init(rngs.params(), (blocks, size, size), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=("heads", None, None))
        self.bias = nnx.Param(jnp.zeros((blocks, size)), axes=("heads", None)) if bias else None

    def __call__(self, x: Array) -> Array:
        """Maps (b t e) to (b t e)."""
        kernel = self.kernel[...]
        blocks, size, _ = kernel.shape
        split = x.astype(kernel.dtype).reshape(*x.shape[:-1], blocks, size)
        y = by_block(split, kernel)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)[None, None]
        return y.reshape(x.shape)
