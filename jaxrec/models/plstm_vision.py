"""The classifier of images of pLSTM: patches on a grid, blocks of modes P and D in turn.

    x = W_patch patches + position;   x = x + P(x), x = x + D(x) for every block;
    logits = W_head pool(norm(x))

Images may be of any size that patches divide: positions are resized, and the corners stay corners.

Pöppel et al., pLSTM: parallelizable linear source transition mark networks (2025),
arXiv:2506.11997, sections 4.4 and 5.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxrec.config import at_least, one_of
from jaxrec.layers.axes import constrain
from jaxrec.layers.linear import Linear
from jaxrec.layers.plstm import Mode, PLSTMGridConfig
from jaxrec.layers.plstm_block import Block, GridBlockConfig, NormConfig, dropped
from jaxrec.layers.plstm_gates import GateConfig, TransitionConfig, small_init
from jaxrec.ops.depth import remat_scan
from jaxrec.ops.patches import patches

Pooling = Literal["corners", "mean", "sum", "center"]
CORNERS = ((0, 0), (-1, 0), (0, -1), (-1, -1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PLSTMVisionConfig:
    """Sizes, and what the two halves of a block are made of."""

    classes: int
    layers: int  # blocks of two halves each
    first: GridBlockConfig  # its width is the width of the stream
    second: GridBlockConfig
    patch: int  # side of a patch, in pixels
    grid: tuple[int, int]  # patches of the images of training, along x and y
    inputs: int = 3  # channels of an image
    position: bool = True  # a learned vector for each patch of the grid
    pooling: Pooling = "corners"  # corners: all four beside each other, so that the head is wider
    drop: float = 0.0  # share of the samples for which a block does nothing, in training
    norm: NormConfig = dataclasses.field(default_factory=NormConfig)
    logits_soft_cap: float | None = None
    channels_first: bool = False  # images are (b c x y) instead of (b x y c)

    axes = ("x", "y")
    """What an example has before its channels."""

    def __post_init__(self) -> None:
        at_least(self, 1, "classes", "layers", "patch", "inputs")
        one_of(self, "pooling", get_args(Pooling))
        if self.first.width != self.second.width:
            raise ValueError(
                "PLSTMVisionConfig: first and second must have one width, got"
                f" {self.first.width} and {self.second.width}."
            )
        if min(self.grid) < 1:
            raise ValueError(f"PLSTMVisionConfig: grid must be >= 1 patches, got {self.grid}.")
        if not 0 <= self.drop < 1:
            raise ValueError(f"PLSTMVisionConfig: drop must lie in [0, 1), got {self.drop}.")

    @property
    def width(self) -> int:
        """Model width d."""
        return self.first.width

    def build(self, *, rngs: nnx.Rngs) -> "PLSTMVision":
        """A freshly initialised model."""
        return PLSTMVision(self, rngs=rngs)


class VisionBlock(nnx.Module):
    """Two halves, one after the other."""

    def __init__(self, config: PLSTMVisionConfig, *, rngs: nnx.Rngs):
        self.drop = config.drop
        self.first = config.first.build(rngs=rngs)
        self.second = config.second.build(rngs=rngs)

    def __call__(self, x: Array, key: Array | None) -> Array:
        """Maps (b x y d) to (b x y d); drops nothing without a key."""
        keys = (None,) * 3 if key is None else tuple(jax.random.split(key, 3))
        y = _half(self.second, _half(self.first, x, keys[0]), keys[1])
        return y if key is None or not self.drop else x + dropped(y - x, self.drop, keys[2])


def _half(block: Block, x: Array, key: Array | None) -> Array:
    return block(x, key=key)[0]


class PLSTMVision(nnx.Module):
    """The model."""

    def __init__(self, config: PLSTMVisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        pixels = (config.patch, config.patch, config.inputs)
        init = small_init(config.patch)
        kernel = init(rngs.params(), (*pixels, width), jnp.float32)
        self.patch_kernel = nnx.Param(kernel, axes=(None, None, None, "embed"))
        self.patch_bias = nnx.Param(jnp.zeros(width), axes=("embed",))
        shape = (*config.grid, width)
        self.position = (
            nnx.Param(
                small_init(width)(rngs.params(), shape, jnp.float32), axes=(None, None, "embed")
            )
            if config.position
            else None
        )
        keys = jax.random.split(rngs.params(), config.layers)
        self.blocks = jax.vmap(lambda key: VisionBlock(config, rngs=nnx.Rngs(key)))(keys)
        self.norm = config.norm.build(width)
        pooled = width * (len(CORNERS) if config.pooling == "corners" else 1)
        self.head = Linear(
            pooled,
            config.classes,
            init=jax.nn.initializers.truncated_normal(2e-5),
            axes=("embed", None),
            bias=True,
            rngs=rngs,
        )

    def __call__(self, images: Array, lengths: None = None, *, key: Array | None = None) -> Array:
        """Scores the classes.

        Args:
          images: (b x y c), or (b c x y) if the configuration says so, float; their sides are
            multiples of the patch's.
          lengths: None: all of an image counts. It is there so that images are trained on as
            sequences are.
          key: of what is dropped; None drops nothing.

        Returns:
          Logits (b classes), float32.

        Raises:
          ValueError: the images do not fit.
        """
        config = self.config
        if lengths is not None:
            raise ValueError("PLSTMVision: images have no lengths.")
        if config.channels_first and images.ndim == 4:
            images = jnp.moveaxis(images, 1, -1)
        kernel, bias = self.patch_kernel[...], self.patch_bias[...]
        x = patches(images, kernel, bias, None if self.position is None else self.position[...])
        x = constrain(x, "batch", None, None, None)
        keys = None if key is None else jax.random.split(key, config.layers)

        def body(x: Array, layer: tuple[VisionBlock, Array | None]) -> tuple[Array, None]:
            block, block_key = layer
            return block(x, block_key), None

        with jax.named_scope("blocks"):
            x, _ = remat_scan(body, x, (self.blocks, keys))
        with jax.named_scope("head"):
            logits = self.head(self._pooled(self.norm(x))).astype(jnp.float32)
            if config.logits_soft_cap is None:
                return logits
            return config.logits_soft_cap * jnp.tanh(logits / config.logits_soft_cap)

    def _pooled(self, x: Array) -> Array:
        """(b x y d) to (b d), or (b 4*d) of the corners."""
        pooling = self.config.pooling
        if pooling == "corners":
            return jnp.concatenate([x[:, i, j] for i, j in CORNERS], axis=-1)
        if pooling == "center":
            return x[:, x.shape[1] // 2, x.shape[2] // 2]
        total = jnp.sum(x, axis=(1, 2), dtype=jnp.float32)
        if pooling == "mean":
            total = total / (x.shape[1] * x.shape[2])
        return total.astype(x.dtype)


def vision_config(
    *,
    width: int,
    heads: int,
    layers: int,
    patch: int,
    grid: tuple[int, int],
    classes: int,
    inputs: int = 3,
    modes: tuple[Mode, Mode] = ("P", "D"),
    weight: bool = True,
    drop: float = 0.0,
    position: bool = True,
    pooling: Pooling = "corners",
) -> PLSTMVisionConfig:
    """The original's defaults: fused post-up halves of mode P and then D, scalar gates of which
    each reads its own part of the channels.

    Args:
      width: model width d.
      heads: of each layer; four times as many gates must divide the width.
      layers: blocks of two halves.
      patch: side of a patch, in pixels.
      grid: patches of the images of training.
      classes: of the head.
      inputs: channels of an image.
      modes: of the two halves.
      weight: gates read the input; else they are constant.
      drop: share of the samples for which what a half adds is left out, in training.
      position: whether patches have learned positions.
      pooling: what the head reads.
    """
    gate = GateConfig(sub_heads=4 * heads, weight=weight)

    def half(mode: Mode) -> GridBlockConfig:
        mixer = PLSTMGridConfig(
            width=width,
            heads=heads,
            key_width=width // heads,
            value_width=width // heads,
            mode=mode,
            source=gate,
            mark=gate,
            direct=GateConfig(weight=False, bias_init=-6.0),
            transition=TransitionConfig(sub_heads=4 * heads, weight=weight),
        )
        inner = -(-4 * width // 64) * 64
        return GridBlockConfig(width=width, inner=inner, mixer=mixer, drop=drop)

    return PLSTMVisionConfig(
        classes=classes,
        layers=layers,
        first=half(modes[0]),
        second=half(modes[1]),
        patch=patch,
        grid=grid,
        inputs=inputs,
        position=position,
        pooling=pooling,
    )


VISION_T = vision_config(width=192, heads=3, layers=6, patch=16, grid=(12, 12), classes=1000)
"""pLSTM-Vis-T as pretrained on ImageNet at 192 x 192."""

VISION_S = vision_config(
    width=384, heads=6, layers=6, patch=16, grid=(12, 12), classes=1000, drop=0.05
)
"""pLSTM-Vis-S."""

VISION_B = vision_config(
    width=768, heads=12, layers=6, patch=16, grid=(12, 12), classes=1000, drop=0.1
)
"""pLSTM-Vis-B."""
