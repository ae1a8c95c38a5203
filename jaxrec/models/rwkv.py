"""RWKV-4: a language model that mixes over time by means whose weights decay.

    x = norm(embed(tokens));   x = x + time(norm(x)), x = x + channels(norm(x)) for every layer;
    logits = W_head norm(x)

Peng et al., RWKV: reinventing RNNs for the transformer era (2023), arXiv:2305.13048.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxrec.config import at_least
from jaxrec.layers.linear import truncated_normal, uniform
from jaxrec.layers.norm import LayerNorm
from jaxrec.layers.recurrent_lm import RecurrentLM, Unlooped
from jaxrec.layers.rwkv import RWKVBlock

HEAD_NORM_EPSILON = 1e-5  # of the last norm, whatever that of the others is


@dataclasses.dataclass(frozen=True, kw_only=True)
class RWKVConfig(Unlooped):
    """Sizes, in channels, layers and tokens."""

    vocab_size: int
    width: int
    layers: int
    inner_width: int  # channels of the WKV operator; the published models have the width
    mlp_width: int  # inner width of the mixing of channels; published: 4 width
    tie_embeddings: bool = False
    norm_epsilon: float = 1e-5  # of all norms but the last
    context: int = 1024  # longest sequence in training; the state itself has no limit
    # After every so many layers the stream is halved, and what later ones write to it likewise; 0:
    # never. So that half precision does not overflow; the norms undo it but for their epsilon.
    rescale_every: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "vocab_size", "width", "layers", "inner_width", "mlp_width", "context")
        at_least(self, 0, "norm_epsilon", "rescale_every")

    def build(self, *, rngs: nnx.Rngs) -> RecurrentLM:
        """A freshly initialised model."""
        model = RecurrentLM(
            self,
            lambda rngs: RWKVBlock(
                self.width, self.inner_width, self.mlp_width, epsilon=self.norm_epsilon, rngs=rngs
            ),
            norm=LayerNorm(self.width, epsilon=HEAD_NORM_EPSILON),
            # So small that the norm behind it lets it grow at once (section 3.4).
            embedding_init=uniform(1e-4),
            head_init=truncated_normal(0.5 * self.width**-0.5),
            embedding_norm=LayerNorm(self.width, epsilon=self.norm_epsilon),
            tie_embeddings=self.tie_embeddings,
            halve_every=self.rescale_every,
            rngs=rngs,
        )
        _spread_rates_and_blends(model.blocks, self)
        return model

    def flops_per_token(self, time: int, depth: None = None, *, training: bool = False) -> float:
        """Multiplications and additions of all matrix products; three times as many in training."""
        mixers = 4 * self.width * self.inner_width
        mixers += 2 * self.width * self.mlp_width + self.width**2
        forward = 2 * (self.layers * mixers + self.width * self.vocab_size)
        return forward * (3 if training else 1)


def _spread_rates_and_blends(blocks: Any, config: RWKVConfig) -> None:
    """Channels begin with different memories, and deeper layers with longer ones (section 3.4)."""
    layer = jnp.arange(config.layers, dtype=jnp.float32)[:, None]
    depth = layer / max(config.layers - 1, 1)  # 0 in the first layer, 1 in the last
    height = 1 - layer / config.layers  # 1 in the first layer, almost 0 in the last
    place, inner_place = (
        _places(config.width, config.width),
        _places(config.inner_width, max(config.inner_width - 1, 1)),
    )
    number = jnp.arange(config.inner_width, dtype=jnp.int32)
    zigzag = 0.5 * ((number + 1) % 3 - 1).astype(jnp.float32)
    time, channels = blocks.time, blocks.channels
    time.log_rate[...] = -5 + 8 * inner_place ** (0.7 + 1.3 * depth)
    time.bonus[...] = jnp.broadcast_to(math.log(0.3) + zigzag[None], time.bonus.shape)
    time.mix_key[...] = place**height
    time.mix_value[...] = place**height + 0.3 * depth
    time.mix_receptance[...] = place ** (0.5 * height)
    channels.mix_key[...] = place**height
    channels.mix_receptance[...] = place**height


def _places(width: int, whole: int) -> Array:
    """Where each channel lies, (1 d) from 0 up."""
    return jnp.arange(width, dtype=jnp.float32)[None] / whole


TINY = RWKVConfig(vocab_size=272, width=128, layers=4, inner_width=128, mlp_width=512, context=1024)
"""Bytes; 0.9 M parameters, about as many as huginn:TINY."""

SMALL = RWKVConfig(
    vocab_size=32768, width=768, layers=8, inner_width=768, mlp_width=3072, tie_embeddings=True
)
"""About 90 million parameters; for one accelerator."""


def _published(width: int, layers: int) -> RWKVConfig:
    return RWKVConfig(
        vocab_size=50277, width=width, layers=layers, inner_width=width, mlp_width=4 * width
    )


RWKV_169M = _published(768, 12)
"""The published rwkv-4-169m: 169,342,464 parameters."""

RWKV_430M = _published(1024, 24)
"""The published rwkv-4-430m: 430,397,440 parameters."""

RWKV_1_5B = _published(2048, 24)
"""The published rwkv-4-1b5: 1,515,106,304 parameters."""

RWKV_3B = _published(2560, 32)
"""The published rwkv-4-3b: 2,984,627,200 parameters."""

RWKV_7B = _published(4096, 32)
"""The published rwkv-4-7b: 7,392,649,216 parameters."""

RWKV_14B = _published(5120, 40)
"""The published rwkv-4-14b: 14,148,597,760 parameters."""
