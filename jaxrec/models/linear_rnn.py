"""A language model without attention: Griffin's recurrent blocks all the way ("Hawk").

    x = x + recurrent_block(norm(x));   x = x + mlp(norm(x));   logits = soft_cap(embed^T norm(x))

De et al., Griffin: mixing gated linear recurrences with local attention (2024), arXiv:2402.19427.
"""

import dataclasses
import functools

import jax
from flax import nnx

from jaxrec.config import above, at_least, multiple_of
from jaxrec.layers.linear import truncated_normal
from jaxrec.layers.mlp import GatedMLP
from jaxrec.layers.norm import RMSNorm
from jaxrec.layers.recurrent_lm import RecurrentLM, Unlooped
from jaxrec.layers.residual import ResidualBlock
from jaxrec.layers.rglru import RecurrentBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRNNConfig(Unlooped):
    """Sizes, in channels, layers and tokens."""

    vocab_size: int
    width: int
    recurrent_width: int  # channels of the RG-LRU
    heads: int  # blocks of its gates' matrices
    mlp_width: int  # inner width of the gated MLP
    layers: int
    context: int  # longest sequence in training; the state itself has no limit
    conv_width: int = 4
    logits_soft_cap: float | None = 30.0  # logits are cap * tanh(logits / cap)
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        at_least(self, 1, "vocab_size", "width", "mlp_width", "layers", "context")
        at_least(self, 2, "conv_width")
        at_least(self, 0, "norm_epsilon")
        above(self, 0, "logits_soft_cap")
        multiple_of(self, "heads", "recurrent_width")

    def build(self, *, rngs: nnx.Rngs) -> RecurrentLM:
        """A freshly initialised model."""
        return RecurrentLM(
            self,
            functools.partial(_block, self),
            norm=_norm(self),
            embedding_init=truncated_normal(self.width**-0.5),
            embedding_scale=self.width**0.5,
            soft_cap=self.logits_soft_cap,
            first_resets=True,  # the RG-LRU does not shrink the first input of a sequence
            rngs=rngs,
        )

    def flops_per_token(self, time: int, depth: None = None, *, training: bool = False) -> float:
        """Multiplications and additions of all matrix products; three times as many in training."""
        gates = 2 * self.recurrent_width**2 // self.heads
        recurrent = 3 * self.width * self.recurrent_width + gates
        recurrent += self.conv_width * self.recurrent_width
        mlp = 3 * self.width * self.mlp_width
        forward = 2 * (self.layers * (recurrent + mlp) + self.width * self.vocab_size)
        return forward * (3 if training else 1)


def _block(config: LinearRNNConfig, rngs: nnx.Rngs) -> ResidualBlock:
    # What writes to the stream shrinks with the number of writers, so that its scale does not grow
    # with depth.
    writers = 2 * config.layers
    init = truncated_normal(config.width**-0.5)
    return ResidualBlock(
        RecurrentBlock(
            config.width,
            config.recurrent_width,
            config.heads,
            conv_width=config.conv_width,
            init=init,
            out_init=truncated_normal((writers * config.recurrent_width) ** -0.5),
            rngs=rngs,
        ),
        GatedMLP(
            config.width,
            config.mlp_width,
            init=init,
            out_init=truncated_normal((writers * config.mlp_width) ** -0.5),
            activation=jax.nn.gelu,
            bias=True,
            rngs=rngs,
        ),
        norm=functools.partial(_norm, config),
    )


def _norm(config: LinearRNNConfig) -> RMSNorm:
    return RMSNorm(config.width, epsilon=config.norm_epsilon, unit_offset=True)


TINY = LinearRNNConfig(
    vocab_size=272,
    width=128,
    recurrent_width=192,
    heads=4,
    mlp_width=384,
    layers=4,
    context=1024,
)
"""Bytes; 1.01 M parameters, about as many as huginn:TINY."""

SMALL = LinearRNNConfig(
    vocab_size=32768,
    width=768,
    recurrent_width=1024,
    heads=16,
    mlp_width=2304,
    layers=8,
    context=2048,
)
"""About 90 million parameters; for one accelerator."""
