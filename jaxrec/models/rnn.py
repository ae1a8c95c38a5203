"""Language models of the classical cells, whose state is mixed by a full matrix.

    x = x + cell(norm(x)), x = x + mlp(norm(x)) for every layer;   logits = W_head norm(x)

with Elman's network, the GRU, the LSTM or the sLSTM as the cell. They are the models that the
others here are measured by where a state must be tracked: no linear recurrence can do what they do
with a state of fixed size (Merrill et al., The illusion of state in state-space models (2024),
arXiv:2404.08819), and no step of theirs is cheap to run in parallel.
"""

import dataclasses
import functools
from typing import Any, Literal

from flax import nnx

from jaxrec.config import at_least, multiple_of, one_of
from jaxrec.layers.cells import GATES, SLSTM, CellConfig
from jaxrec.layers.linear import truncated_normal
from jaxrec.layers.mlp import GatedMLP
from jaxrec.layers.norm import RMSNorm
from jaxrec.layers.recurrent_lm import RecurrentLM, Unlooped
from jaxrec.layers.residual import ResidualBlock
from jaxrec.layers.scan import Solver

RecurrentCell = Literal["elman", "gru", "lstm", "slstm"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RNNConfig(Unlooped):
    """Sizes, in channels, layers and tokens."""

    vocab_size: int
    width: int  # of the stream and of a cell's state
    layers: int
    mlp_width: int  # inner width of the gated MLP
    cell: RecurrentCell = "gru"
    heads: int = 1  # of the sLSTM: blocks of its recurrent matrices
    norm_epsilon: float = 1e-6
    solver: Solver = dataclasses.field(default_factory=Solver)
    context: int = 2048  # longest sequence in training; the state itself has no limit

    def __post_init__(self) -> None:
        at_least(self, 1, "vocab_size", "width", "layers", "mlp_width", "context")
        at_least(self, 0, "norm_epsilon")
        one_of(self, "cell", (*GATES, "slstm"))
        multiple_of(self, "heads", "width")
        if self.heads > 1 and self.cell != "slstm":
            raise ValueError(
                f"RNNConfig: only the slstm has heads, got {self.heads} of a {self.cell}."
            )

    def build(self, *, rngs: nnx.Rngs) -> RecurrentLM:
        """A freshly initialised model."""
        return RecurrentLM(
            self,
            functools.partial(_block, self),
            norm=RMSNorm(self.width, epsilon=self.norm_epsilon),
            embedding_init=truncated_normal(self.width**-0.5),
            rngs=rngs,
        )

    def flops_per_token(self, time: int, depth: None = None, *, training: bool = False) -> float:
        """Multiplications and additions of all matrix products; three times as many in training."""
        gates = GATES.get(self.cell, 4)
        mixer = gates * self.width**2 * (1 + 1 / self.heads)
        mlp = 3 * self.width * self.mlp_width
        forward = 2 * (self.layers * (mixer + mlp) + self.width * self.vocab_size)
        return forward * (3 if training else 1)


def _block(config: RNNConfig, rngs: nnx.Rngs) -> ResidualBlock:
    d, writers = config.width, 2 * config.layers
    init = truncated_normal(d**-0.5)
    mixer: Any
    if config.cell == "slstm":
        mixer = SLSTM(d, d, config.heads, init=init, solver=config.solver, rngs=rngs)
    else:
        mixer = CellConfig(kind=config.cell, inputs=d, width=d).build(rngs=rngs)
        mixer.solver = config.solver
    mlp = GatedMLP(
        d,
        config.mlp_width,
        init=init,
        out_init=truncated_normal((writers * config.mlp_width) ** -0.5),
        rngs=rngs,
    )
    return ResidualBlock(
        mixer, mlp, norm=functools.partial(RMSNorm, d, epsilon=config.norm_epsilon)
    )


TINY_GRU = RNNConfig(vocab_size=272, width=128, layers=4, mlp_width=320, context=1024)
"""Bytes; 0.9 M parameters, about as many as huginn:TINY."""

TINY_SLSTM = dataclasses.replace(TINY_GRU, cell="slstm", heads=4)
"""The same of sLSTM cells, in four heads."""
