"""Mamba: a language model whose only mixing over time is a selective state-space recurrence.

    x = embed(tokens);   x = x + mixer(norm(x)) for every layer;   logits = W_head norm(x)

Gu & Dao, Mamba: linear-time sequence modeling with selective state spaces (2023), arXiv:2312.00752.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrec.config import above, at_least, one_of
from jaxrec.layers.activations import Activation, activation
from jaxrec.layers.linear import uniform
from jaxrec.layers.mamba import Mamba, log_uniform_step_bias
from jaxrec.layers.norm import RMSNorm
from jaxrec.layers.recurrent_lm import RecurrentLM, Unlooped
from jaxrec.layers.residual import ResidualBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig(Unlooped):
    """Sizes, in channels, layers and tokens, and how the weights begin."""

    vocab_size: int
    width: int
    layers: int
    inner_width: int  # channels of the recurrence; the published models have 2 width
    step_rank: int  # bottleneck through which step sizes come; published: width / 16
    state_size: int = 16  # numbers kept for each inner channel
    conv_width: int = 4
    conv_bias: bool = True
    bias: bool = False  # of the mixer's first and last projection
    activation: Activation = "silu"
    tie_embeddings: bool = True
    residual_in_float32: bool = True  # the stream, whatever the dtype of the weights
    norm_epsilon: float = 1e-5
    context: int = 2048  # longest sequence in training; the state itself has no limit
    init_std: float = 0.1  # of the embedding
    shrink_output: bool = False  # out projections begin 1 / sqrt(layers) as large
    step_min: float = 1e-3  # step sizes begin log-uniform between these two,
    step_max: float = 1e-1
    step_floor: float = 1e-4  # and no smaller than this
    step_scale: float = 1.0  # of the initial weights of the step sizes
    step_init: Literal["random", "constant"] = "random"  # of those weights: uniform, or all equal

    def __post_init__(self) -> None:
        at_least(self, 1, "vocab_size", "width", "layers", "inner_width", "step_rank")
        at_least(self, 1, "state_size", "context")
        at_least(self, 2, "conv_width")
        at_least(self, 0, "norm_epsilon", "init_std", "step_floor")
        above(self, 0, "step_scale")
        if not 0 < self.step_min <= self.step_max:
            raise ValueError(
                f"MambaConfig: needs 0 < step_min <= step_max, got {self.step_min} and"
                f" {self.step_max}."
            )
        one_of(self, "step_init", ("random", "constant"))
        activation(self.activation)

    def build(self, *, rngs: nnx.Rngs) -> RecurrentLM:
        """A freshly initialised model."""
        return RecurrentLM(
            self,
            functools.partial(_block, self),
            norm=_norm(self),
            embedding_init=jax.nn.initializers.normal(self.init_std),
            tie_embeddings=self.tie_embeddings,
            stream_dtype=jnp.float32 if self.residual_in_float32 else None,
            rngs=rngs,
        )

    def flops_per_token(self, time: int, depth: None = None, *, training: bool = False) -> float:
        """Multiplications and additions of all matrix products; three times as many in training."""
        mixer = 3 * self.width * self.inner_width
        mixer += self.inner_width * (2 * self.step_rank + 2 * self.state_size + self.conv_width)
        forward = 2 * (self.layers * mixer + self.width * self.vocab_size)
        return forward * (3 if training else 1)


def _block(config: MambaConfig, rngs: nnx.Rngs) -> ResidualBlock:
    step = config.step_scale * config.step_rank**-0.5
    mixer = Mamba(
        config.width,
        config.inner_width,
        config.state_size,
        config.step_rank,
        conv_width=config.conv_width,
        conv_bias=config.conv_bias,
        bias=config.bias,
        activation=activation(config.activation),
        out_scale=config.layers**-0.5 if config.shrink_output else 1.0,
        step_init=(
            jax.nn.initializers.constant(step) if config.step_init == "constant" else uniform(step)
        ),
        step_bias_init=log_uniform_step_bias(config.step_min, config.step_max, config.step_floor),
        rngs=rngs,
    )
    return ResidualBlock(mixer, None, norm=functools.partial(_norm, config))


def _norm(config: MambaConfig) -> RMSNorm:
    return RMSNorm(config.width, epsilon=config.norm_epsilon)


TINY = MambaConfig(vocab_size=272, width=128, layers=8, inner_width=256, step_rank=8, context=1024)
"""Bytes; 1.0 M parameters, about as many as huginn:TINY."""

SMALL = MambaConfig(vocab_size=32768, width=768, layers=18, inner_width=1536, step_rank=48)
"""About 90 million parameters; for one accelerator."""


def _published(width: int, layers: int) -> MambaConfig:
    return MambaConfig(
        vocab_size=50280,
        width=width,
        layers=layers,
        inner_width=2 * width,
        step_rank=width // 16,
    )


MAMBA_130M = _published(768, 24)
"""The published mamba-130m: 129,135,360 parameters."""

MAMBA_370M = _published(1024, 48)
"""The published mamba-370m: 371,516,416 parameters."""

MAMBA_790M = _published(1536, 48)
"""The published mamba-790m: 793,204,224 parameters."""

MAMBA_1_4B = _published(2048, 48)
"""The published mamba-1.4b: 1,372,178,432 parameters."""

MAMBA_2_8B = _published(2560, 64)
"""The published mamba-2.8b: 2,768,345,600 parameters."""
