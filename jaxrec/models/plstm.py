"""The language model of pLSTM: blocks that project up, mix by a source-transition-mark network with
state tracking, and project down.

    x = embed(tokens);   x = block(x) for every layer;   logits = soft_cap(W_head norm(x))

Pöppel et al., pLSTM: parallelizable linear source transition mark networks (2025),
arXiv:2506.11997.
"""

import dataclasses

from flax import nnx

from jaxrec.config import above, at_least
from jaxrec.layers.plstm import PLSTMConfig
from jaxrec.layers.plstm_block import NormConfig, SequenceBlockConfig
from jaxrec.layers.plstm_gates import GateConfig, ProjectionConfig, small_init
from jaxrec.layers.recurrent_lm import RecurrentLM, Unlooped


@dataclasses.dataclass(frozen=True, kw_only=True)
class PLSTMLMConfig(Unlooped):
    """Sizes, in channels, layers and tokens."""

    vocab_size: int
    layers: int
    block: SequenceBlockConfig  # its width is the width of the stream
    context: int = 2048  # longest sequence in training; the state itself has no limit
    logits_soft_cap: float | None = 10.0
    tie_embeddings: bool = False
    # Of the stream that the head reads.
    norm: NormConfig = dataclasses.field(default_factory=NormConfig)

    def __post_init__(self) -> None:
        at_least(self, 1, "vocab_size", "layers", "context")
        above(self, 0, "logits_soft_cap")

    @property
    def width(self) -> int:
        """Model width d."""
        return self.block.width

    def build(self, *, rngs: nnx.Rngs) -> RecurrentLM:
        """A freshly initialised model."""
        return RecurrentLM(
            self,
            lambda rngs: self.block.build(rngs=rngs),
            norm=self.norm.build(self.width),
            embedding_init=small_init(self.width),
            tie_embeddings=self.tie_embeddings,
            soft_cap=self.logits_soft_cap,
            rngs=rngs,
        )

    def flops_per_token(self, time: int, depth: None = None, *, training: bool = False) -> float:
        """Multiplications and additions of all matrix products, those of a chunk of steps and with
        the memory included; three times as many in training.
        """
        block, mixer = self.block, self.block.mixer
        inner = mixer.width
        projections = inner * mixer.heads
        projections *= mixer.key_width * (mixer.jq + mixer.jk) + mixer.value_width * mixer.jv
        projections //= mixer.query.sub_heads
        inputs, outputs = mixer.jk * mixer.jv, mixer.jo * mixer.jq
        tracked = mixer.jt * (inputs + outputs + mixer.jt)
        maps = inner * mixer.heads * (tracked + 2 * mixer.jt**2)
        memory = mixer.heads * mixer.key_width * mixer.value_width
        memory *= mixer.jt * (2 * mixer.jt + inputs + outputs)
        within = min(mixer.chunk, time) * mixer.heads
        within *= mixer.key_width + mixer.value_width * mixer.jv * mixer.jo
        out = inner**2 if mixer.out else 0
        up = self.width * block.inner * (3 if block.gated else 2)
        layer = projections + maps + memory + within + out + up
        forward = 2 * (self.layers * layer + self.width * self.vocab_size)
        return forward * (3 if training else 1)


def lm_config(
    *, vocab_size: int, width: int, layers: int, heads: int = 4, context: int = 2048
) -> PLSTMLMConfig:
    """The original's defaults: pre-up blocks of twice the width, whose heads read parts of 4
    channels, with 4 states, values and outputs each.
    """
    inner = 2 * width
    parts = ProjectionConfig(sub_heads=inner // 4)
    mixer = PLSTMConfig(
        width=inner,
        heads=heads,
        key_width=inner // heads,
        value_width=inner // heads // 4,
        source=GateConfig(),
        direct=GateConfig(weight=False, bias_init=-6.0),
        query=parts,
        key=parts,
        value=parts,
        out=False,
    )
    block = SequenceBlockConfig(width=width, inner=inner, mixer=mixer)
    return PLSTMLMConfig(vocab_size=vocab_size, layers=layers, block=block, context=context)


TINY = lm_config(vocab_size=272, width=128, layers=4, context=1024)
"""Bytes; about 1 M parameters, as many as huginn:TINY."""

SMALL = lm_config(vocab_size=32768, width=768, layers=6)
"""For one accelerator."""
