"""Mamba-2: a language model of state-space recurrences with a matrix state and scalar decays.

    x = embed(tokens);   x = x + mixer(norm(x)) for every layer;   logits = W_head norm(x)

Dao & Gu, Transformers are SSMs (2024), arXiv:2405.21060.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrec.config import at_least, multiple_of
from jaxrec.layers.activations import Activation, activation
from jaxrec.layers.mamba import log_uniform_step_bias
from jaxrec.layers.mamba2 import Mamba2
from jaxrec.layers.norm import RMSNorm
from jaxrec.layers.recurrent_lm import RecurrentLM, Unlooped
from jaxrec.layers.residual import ResidualBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(Unlooped):
    """Sizes, in channels, layers and tokens, and how the weights begin."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    head_width: int = 64  # heads of this width make the inner width; published: 2 width in all
    state_size: int = 128  # numbers kept for each inner channel
    groups: int = 1  # of heads that share what is written to and read from the state
    conv_width: int = 4
    conv_bias: bool = True
    bias: bool = False  # of the mixer's first and last projection
    activation: Activation = "silu"  # after the convolution
    step_limit: tuple[float, float] = (0.0, float("inf"))  # of step sizes
    tie_embeddings: bool = True
    residual_in_float32: bool = True  # the stream, whatever the dtype of the weights
    norm_epsilon: float = 1e-5
    context: int = 2048  # longest sequence in training; the state itself has no limit
    init_std: float = 0.1  # of the embedding
    shrink_output: bool = False  # out projections begin 1 / sqrt(layers) as large
    step_min: float = 1e-3  # step sizes begin log-uniform between these two,
    step_max: float = 1e-1
    step_floor: float = 1e-4  # and no smaller than this

    def __post_init__(self) -> None:
        at_least(self, 1, "vocab_size", "width", "layers", "head_width", "state_size", "context")
        at_least(self, 2, "conv_width")
        at_least(self, 0, "norm_epsilon", "init_std", "step_floor")
        multiple_of(self, "groups", "heads")
        if not 0 < self.step_min <= self.step_max:
            raise ValueError(
                f"Mamba2Config: needs 0 < step_min <= step_max, got {self.step_min} and"
                f" {self.step_max}."
            )
        if not 0 <= self.step_limit[0] < self.step_limit[1]:
            raise ValueError(
                f"Mamba2Config: step_limit needs 0 <= lowest < highest, got {self.step_limit}."
            )
        activation(self.activation)

    @property
    def inner_width(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_width

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
        """Multiplications and additions of all matrix products, the recurrence as two products with
        the state; three times as many in training.
        """
        inner, shared = self.inner_width, 2 * self.groups * self.state_size
        mixer = self.width * (3 * inner + shared + self.heads)
        mixer += (inner + shared) * self.conv_width + 2 * inner * self.state_size
        forward = 2 * (self.layers * mixer + self.width * self.vocab_size)
        return forward * (3 if training else 1)


def _block(config: Mamba2Config, rngs: nnx.Rngs) -> ResidualBlock:
    mixer = Mamba2(
        config.width,
        config.heads,
        config.head_width,
        config.state_size,
        groups=config.groups,
        conv_width=config.conv_width,
        conv_bias=config.conv_bias,
        bias=config.bias,
        activation=activation(config.activation),
        step_limit=config.step_limit,
        norm_epsilon=config.norm_epsilon,
        out_scale=config.layers**-0.5 if config.shrink_output else 1.0,
        step_bias_init=log_uniform_step_bias(config.step_min, config.step_max, config.step_floor),
        rngs=rngs,
    )
    return ResidualBlock(mixer, None, norm=functools.partial(_norm, config))


def _norm(config: Mamba2Config) -> RMSNorm:
    return RMSNorm(config.width, epsilon=config.norm_epsilon)


TINY = Mamba2Config(
    vocab_size=272, width=128, layers=9, heads=8, head_width=32, state_size=32, context=1024
)
"""Bytes; 1.0 M parameters, about as many as huginn:TINY."""

SMALL = Mamba2Config(vocab_size=32768, width=768, layers=18, heads=24)
"""About 90 million parameters; for one accelerator."""


def _published(width: int, layers: int) -> Mamba2Config:
    return Mamba2Config(vocab_size=50288, width=width, layers=layers, heads=2 * width // 64)


MAMBA2_130M = _published(768, 24)
"""The published mamba2-130m."""

MAMBA2_370M = _published(1024, 48)
"""The published mamba2-370m."""

MAMBA2_780M = _published(1536, 48)
"""The published mamba2-780m."""

MAMBA2_1_3B = _published(2048, 48)
"""The published mamba2-1.3b."""

MAMBA2_2_7B = _published(2560, 64)
"""The published mamba2-2.7b."""
