"""A vision transformer: the baseline of classifiers of images.

    x = [class; W_patch patches + position];   x = x + attention(norm(x)),  x = x + mlp(norm(x));
    logits = W_head norm(x)_class

Every patch sees every other one, with nothing but the learned positions to say where they are.
Images may be of any size that patches divide: positions are resized.

Dosovitskiy et al., An image is worth 16x16 words (2020), arXiv:2010.11929, with no position on the
class token, as Touvron et al., DeiT III (2022), arXiv:2204.07118.
"""

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxrec.config import at_least, multiple_of, one_of
from jaxrec.layers.attention import Attention
from jaxrec.layers.axes import constrain
from jaxrec.layers.linear import Linear, truncated_normal
from jaxrec.layers.mlp import MLP
from jaxrec.layers.norm import LayerNorm
from jaxrec.layers.residual import ResidualBlock
from jaxrec.ops.depth import remat_scan
from jaxrec.ops.patches import patches

Pooling = Literal["class", "mean"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes."""

    classes: int
    width: int
    heads: int
    layers: int
    mlp_width: int
    patch: int  # side of a patch, in pixels
    grid: tuple[int, int]  # patches of the images of training, along x and y
    inputs: int = 3  # channels of an image
    pooling: Pooling = "class"  # what the head reads: a token of its own, or the mean of patches

    axes = ("x", "y")
    """What an example has before its channels."""

    def __post_init__(self) -> None:
        at_least(self, 1, "classes", "layers", "mlp_width", "patch", "inputs")
        multiple_of(self, "heads", "width")
        one_of(self, "pooling", get_args(Pooling))
        if min(self.grid) < 1:
            raise ValueError(f"ViTConfig: grid must be >= 1 patches, got {self.grid}.")

    def build(self, *, rngs: nnx.Rngs) -> "ViT":
        """A freshly initialised model."""
        return ViT(self, rngs=rngs)


class ViT(nnx.Module):
    """The model."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, init = config.width, truncated_normal(0.02)
        pixels = (config.patch, config.patch, config.inputs)
        self.patch_kernel = nnx.Param(
            init(rngs.params(), (*pixels, width), jnp.float32), axes=(None, None, None, "embed")
        )
        self.patch_bias = nnx.Param(jnp.zeros(width), axes=("embed",))
        self.position = nnx.Param(
            init(rngs.params(), (*config.grid, width), jnp.float32), axes=(None, None, "embed")
        )
        self.class_token = (
            nnx.Param(init(rngs.params(), (width,), jnp.float32), axes=("embed",))
            if config.pooling == "class"
            else None
        )

        def block(key: Array) -> ResidualBlock:
            rngs = nnx.Rngs(key)
            mlp = MLP(width, config.mlp_width, init=init, activation=_gelu, rngs=rngs)
            norm = functools.partial(LayerNorm, width, epsilon=1e-6)
            mixer = Attention(
                width,
                config.heads,
                bias=True,
                out_bias=True,
                rotary_base=None,
                causal=False,
                init=init,
                rngs=rngs,
            )
            return ResidualBlock(mixer, mlp, norm=norm)

        self.blocks = jax.vmap(block)(jax.random.split(rngs.params(), config.layers))
        self.norm = LayerNorm(width, epsilon=1e-6)
        self.head = Linear(
            width, config.classes, init=init, axes=("embed", None), bias=True, rngs=rngs
        )

    def __call__(self, images: Array, lengths: None = None, *, key: Array | None = None) -> Array:
        """Scores the classes.

        Args:
          images: (b x y c), float; their sides are multiples of the patch's.
          lengths: None: all of an image counts, as in the other classifiers.
          key: nothing is random; it is there so that all classifiers are trained alike.

        Returns:
          Logits (b classes), float32.

        Raises:
          ValueError: the images do not fit.
        """
        if lengths is not None:
            raise ValueError("ViT: images have no lengths.")
        x = patches(images, self.patch_kernel[...], self.patch_bias[...], self.position[...])
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.class_token is not None:
            token = self.class_token[...].astype(x.dtype)[None, None]
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, x.shape[2])), x], axis=1)
        x = constrain(x, "batch", None, None)

        def body(x: Array, block: ResidualBlock) -> tuple[Array, None]:
            return block(x, None)

        with jax.named_scope("blocks"):
            x, _ = remat_scan(body, x, self.blocks)
        with jax.named_scope("head"):
            x = self.norm(x)
            if self.class_token is not None:
                pooled = x[:, 0]
            else:
                pooled = jnp.mean(x, axis=1, dtype=jnp.float32).astype(x.dtype)
            return self.head(pooled).astype(jnp.float32)


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


VIT_T = ViTConfig(
    classes=1000, width=192, heads=3, layers=12, mlp_width=768, patch=16, grid=(14, 14)
)
"""ViT-T/16 at 224 x 224."""
