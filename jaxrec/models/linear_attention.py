"""Language models of linear attention: RetNet, GLA, DeltaNet, Gated DeltaNet and their mixtures.

    x = x + linear_attention(norm(x));   x = x + mlp(norm(x));   logits = W_head norm(x)

They differ in how the matrix state of a head is written (`rule`) and forgotten (`gate`), see
`layers/linear_attention.py`; the published ones also in short convolutions, rotation and gating,
each of which is a field here.

Sun et al., Retentive network (2023), arXiv:2307.08621; Yang et al., Gated linear attention
transformers with hardware-efficient training (2023), arXiv:2312.06635; Yang et al., Parallelizing
linear transformers with the delta rule over sequence length (2024), arXiv:2406.06484; Yang et al.,
Gated delta networks (2024), arXiv:2412.06464.
"""

import dataclasses
import functools
from typing import get_args

from flax import nnx

from jaxrec.config import above, at_least, one_of
from jaxrec.layers.linear import truncated_normal
from jaxrec.layers.linear_attention import Gate, LinearAttention
from jaxrec.layers.mlp import GatedMLP
from jaxrec.layers.norm import RMSNorm
from jaxrec.layers.recurrent_lm import RecurrentLM, Unlooped
from jaxrec.layers.residual import ResidualBlock
from jaxrec.ops.time.matrix_scan import Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig(Unlooped):
    """Sizes, in channels, layers and tokens, and what sets the systems apart."""

    vocab_size: int
    width: int
    heads: int
    key_width: int  # of one head
    value_width: int  # of one head
    mlp_width: int  # inner width of the gated MLP
    layers: int
    rule: Rule = "gated"  # "delta": a key's old value is replaced, instead of added to
    gate: Gate = "none"  # where the decays of the state come from
    gate_rank: int = 16  # bottleneck of the gates that have a decay for every key
    beta_scale: float = 1.0  # largest write strength of the delta rule; 2 allows it to turn values
    conv_width: int | None = None  # taps of the convolutions of queries, keys, values; None: none
    rotary_base: float | None = None  # of the rotation of queries and keys; None: not rotated
    output_gate: bool = True  # what a head reads is gated by the input
    tie_embeddings: bool = True
    context: int = 2048  # longest sequence in training; the state itself has no limit
    chunk: int = 64  # tokens that are worked on together
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        at_least(self, 1, "vocab_size", "width", "heads", "key_width", "value_width", "mlp_width")
        at_least(self, 1, "layers", "gate_rank", "context", "chunk")
        at_least(self, 0, "norm_epsilon")
        above(self, 0, "rotary_base")
        one_of(self, "rule", get_args(Rule))
        one_of(self, "gate", get_args(Gate))
        if self.conv_width is not None:
            at_least(self, 2, "conv_width")
        if self.rotary_base is not None and self.key_width % 2:
            raise ValueError(
                "LinearAttentionConfig: key_width must be even to be rotated, got"
                f" {self.key_width}."
            )
        if not 0 < self.beta_scale <= 2:
            raise ValueError(
                f"LinearAttentionConfig: beta_scale must be in (0, 2], got {self.beta_scale}."
            )

    def build(self, *, rngs: nnx.Rngs) -> RecurrentLM:
        """A freshly initialised model."""
        return RecurrentLM(
            self,
            functools.partial(_block, self),
            norm=_norm(self),
            embedding_init=truncated_normal(self.width**-0.5),
            embedding_scale=self.width**0.5,
            tie_embeddings=self.tie_embeddings,
            rngs=rngs,
        )

    def flops_per_token(self, time: int, depth: None = None, *, training: bool = False) -> float:
        """Multiplications and additions of all matrix products; three times as many in training."""
        keys, values, chunk = self.key_width, self.value_width, min(self.chunk, time)
        by_key = self.gate in ("logistic", "key_step")
        projections = self.heads * (2 * keys + (3 if self.output_gate else 2) * values)
        projections += self.heads * (self.rule == "delta") + self.heads * (self.gate == "step")
        mixer = self.width * projections
        mixer += self.gate_rank * (self.width + self.heads * keys) * by_key
        mixer += (self.conv_width or 0) * self.heads * (2 * keys + values)
        # Queries see the keys of their chunk and read the state, which values enter.
        mixer += self.heads * (chunk * (keys + values) + 2 * keys * values)
        if self.rule == "delta":  # keys see keys; what they hold is solved for and taken out
            mixer += self.heads * (chunk * (3 * keys + values) + keys * keys)
        mlp = 3 * self.width * self.mlp_width
        forward = 2 * (self.layers * (mixer + mlp) + self.width * self.vocab_size)
        return forward * (3 if training else 1)


def _block(config: LinearAttentionConfig, rngs: nnx.Rngs) -> ResidualBlock:
    # What writes to the stream shrinks with the number of writers, so that its scale does not grow
    # with depth.
    writers = 2 * config.layers
    init = truncated_normal(config.width**-0.5)
    return ResidualBlock(
        LinearAttention(
            config.width,
            config.heads,
            config.key_width,
            config.value_width,
            rule=config.rule,
            gate=config.gate,
            gate_rank=config.gate_rank,
            beta_scale=config.beta_scale,
            conv_width=config.conv_width,
            rotary_base=config.rotary_base,
            output_gate=config.output_gate,
            chunk=config.chunk,
            norm_epsilon=config.norm_epsilon,
            init=init,
            out_init=truncated_normal((writers * config.heads * config.value_width) ** -0.5),
            rngs=rngs,
        ),
        GatedMLP(
            config.width,
            config.mlp_width,
            init=init,
            out_init=truncated_normal((writers * config.mlp_width) ** -0.5),
            rngs=rngs,
        ),
        norm=functools.partial(_norm, config),
    )


def _norm(config: LinearAttentionConfig) -> RMSNorm:
    return RMSNorm(config.width, epsilon=config.norm_epsilon)


RETNET_TINY = LinearAttentionConfig(
    vocab_size=272,
    width=128,
    heads=4,
    key_width=32,
    value_width=64,
    mlp_width=288,
    layers=4,
    gate="constant",
    rotary_base=10000.0,
    context=1024,
)
"""Bytes; 1.0 M parameters, about as many as linear_rnn:TINY."""

GLA_TINY = LinearAttentionConfig(
    vocab_size=272,
    width=128,
    heads=2,
    key_width=32,
    value_width=64,
    mlp_width=448,
    layers=4,
    gate="logistic",
    context=1024,
)
"""Bytes; 1.0 M parameters, about as many as linear_rnn:TINY."""

DELTANET_TINY = LinearAttentionConfig(
    vocab_size=272,
    width=128,
    heads=4,
    key_width=32,
    value_width=32,
    mlp_width=448,
    layers=4,
    rule="delta",
    conv_width=4,
    output_gate=False,
    context=1024,
)
"""Bytes; 1.0 M parameters, about as many as linear_rnn:TINY."""

GATED_DELTANET_TINY = LinearAttentionConfig(
    vocab_size=272,
    width=128,
    heads=3,
    key_width=32,
    value_width=64,
    mlp_width=384,
    layers=4,
    rule="delta",
    gate="step",
    conv_width=4,
    context=1024,
)
"""Bytes; 1.0 M parameters, about as many as linear_rnn:TINY."""

GLA_1_3B = LinearAttentionConfig(
    vocab_size=32000,
    width=2048,
    heads=4,
    key_width=256,
    value_width=512,
    mlp_width=5632,
    layers=24,
    gate="logistic",
    tie_embeddings=False,
)
"""About the size of GLA 1.3B: keys of half the width, values of all of it. Vocabulary and MLP are
ours."""

DELTANET_1_3B = LinearAttentionConfig(
    vocab_size=32000,
    width=2048,
    heads=16,
    key_width=128,
    value_width=128,
    mlp_width=5632,
    layers=24,
    rule="delta",
    conv_width=4,
    output_gate=False,
    tie_embeddings=False,
)
"""About the size of DeltaNet 1.3B: heads of 128. Vocabulary and MLP are ours."""

GATED_DELTANET_1_3B = LinearAttentionConfig(
    vocab_size=32000,
    width=2048,
    heads=6,
    key_width=256,
    value_width=512,
    mlp_width=5632,
    layers=21,
    rule="delta",
    gate="step",
    conv_width=4,
    tie_embeddings=False,
)
"""About the size of Gated DeltaNet 1.3B: heads of 256 keys, values twice as wide. Vocabulary, MLP
and the 21 layers, as many as this number of parameters has room for, are ours.
"""
