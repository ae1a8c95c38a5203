"""xLSTM as its 7B model has it: a language model of matrix memories with exponential gates.

    x = embed(tokens);   x = x + mlstm(norm(x)), x = x + mlp(norm(x)) for every layer;
    logits = soft_cap(W_head norm(x))

Beck et al., xLSTM 7B: a recurrent LLM for fast and efficient inference (2025), arXiv:2503.13427.
"""

import dataclasses
import functools
from typing import Literal

import jax
from flax import nnx

from jaxrec.config import above, at_least, multiple_of, one_of
from jaxrec.layers.mlp import GatedMLP
from jaxrec.layers.mlstm import MLSTM
from jaxrec.layers.norm import RMSNorm
from jaxrec.layers.recurrent_lm import RecurrentLM, Unlooped
from jaxrec.layers.residual import ResidualBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class XLSTMConfig(Unlooped):
    """Sizes, in channels, layers and tokens."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    key_width: int  # channels of queries and of keys, of all heads; xLSTM 7B: width / 2
    value_width: int  # channels of values, of all heads
    mlp_width: int  # inner width of the gated MLP
    bias: bool = False  # of projections, of norms but the last, and of the MLP
    gate_soft_cap: float | None = 15.0  # input and forget gates are cap * tanh(gate / cap)
    logits_soft_cap: float | None = 30.0
    norm_epsilon: float = 1e-6
    epsilon: float = 1e-6  # of the memory's denominator
    chunk: int = 64  # steps that are worked on together
    context: int = 8192  # longest sequence in training; the state itself has no limit
    # How checkpoints hold projections of the same input: one by one or as one. Nothing else.
    weight_mode: Literal["single", "fused"] = "single"

    def __post_init__(self) -> None:
        at_least(self, 1, "vocab_size", "width", "layers", "mlp_width", "chunk", "context")
        multiple_of(self, "heads", "key_width", "value_width")
        one_of(self, "weight_mode", ("single", "fused"))
        at_least(self, 0, "norm_epsilon", "epsilon")
        above(self, 0, "gate_soft_cap", "logits_soft_cap")

    def build(self, *, rngs: nnx.Rngs) -> RecurrentLM:
        """A freshly initialised model."""
        return RecurrentLM(
            self,
            functools.partial(_block, self),
            norm=RMSNorm(self.width, epsilon=self.norm_epsilon),
            embedding_init=jax.nn.initializers.normal((2 / (5 * self.width)) ** 0.5),
            tie_embeddings=False,
            soft_cap=self.logits_soft_cap,
            rngs=rngs,
        )

    def flops_per_token(self, time: int, depth: None = None, *, training: bool = False) -> float:
        """Multiplications and additions of all matrix products, those with the memory included;
        three times as many in training.
        """
        mixer = self.width * (2 * self.key_width + 3 * self.value_width + 2 * self.heads)
        mixer += 2 * self.key_width * self.value_width // self.heads
        mlp = 3 * self.width * self.mlp_width
        forward = 2 * (self.layers * (mixer + mlp) + self.width * self.vocab_size)
        return forward * (3 if training else 1)


def _block(config: XLSTMConfig, rngs: nnx.Rngs) -> ResidualBlock:
    normal = jax.nn.initializers.normal
    into = normal((2 / (5 * config.width)) ** 0.5)
    mixer = MLSTM(
        config.width,
        config.heads,
        config.key_width,
        config.value_width,
        bias=config.bias,
        gate_soft_cap=config.gate_soft_cap,
        norm_epsilon=config.norm_epsilon,
        epsilon=config.epsilon,
        chunk=config.chunk,
        init=into,
        out_init=normal(2 / config.layers / config.width**0.5),
        rngs=rngs,
    )
    mlp = GatedMLP(
        config.width,
        config.mlp_width,
        init=into,
        out_init=normal(2 / config.layers / config.mlp_width**0.5),
        bias=config.bias,
        rngs=rngs,
    )
    norm = functools.partial(RMSNorm, config.width, epsilon=config.norm_epsilon, bias=config.bias)
    return ResidualBlock(mixer, mlp, norm=norm)


TINY = XLSTMConfig(
    vocab_size=272,
    width=128,
    layers=4,
    heads=4,
    key_width=64,
    value_width=128,
    mlp_width=320,
    context=1024,
)
"""Bytes; 0.8 M parameters, about as many as huginn:TINY."""

SMALL = XLSTMConfig(
    vocab_size=32768,
    width=768,
    layers=6,
    heads=4,
    key_width=384,
    value_width=768,
    mlp_width=2048,
    context=2048,
)
"""About 90 million parameters; for one accelerator."""

XLSTM_7B = XLSTMConfig(
    vocab_size=50304,
    width=4096,
    layers=32,
    heads=8,
    key_width=2048,
    value_width=4096,
    mlp_width=10944,
)
"""The published xLSTM-7b: 6,865,424,896 parameters."""
