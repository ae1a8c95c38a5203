"""ParaRNN: language models of ParaGRU or ParaLSTM cells, nonlinear and trained in parallel.

    a, g = W norm(x);   y = W_out (norm(cell(silu(conv(a)))) * silu(g));   x = s x + y
    x = x + mlp(norm(x)) for every layer;   logits = embed^T norm(x)

with a learned s for each layer. Danieli et al., ParaRNN: unlocking parallel training of nonlinear
RNNs for large language models (2025), arXiv:2510.21450, section 4: the cell stands where Mamba has
its state space.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxrec.config import above, at_least, multiple_of, one_of
from jaxrec.layers.activations import silu
from jaxrec.layers.axes import constrain
from jaxrec.layers.linear import Linear, truncated_normal
from jaxrec.layers.mlp import GatedMLP
from jaxrec.layers.norm import RMSNorm
from jaxrec.layers.pararnn import CellKind, ParaRNN, ParaRNNConfig
from jaxrec.layers.recurrent_lm import RecurrentLM, Unlooped
from jaxrec.layers.scan import Solver
from jaxrec.ops.conv import causal_conv


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParaRNNLMConfig(Unlooped):
    """Sizes, in channels, layers and tokens."""

    vocab_size: int
    width: int
    layers: int
    heads: int  # blocks of the map from the input to a cell's gates
    mlp_width: int  # inner width of the gated MLP
    cell: CellKind = "gru"
    conv_width: int = 4
    # Recurrent entries are cut to [-limit, limit]. Within 0.5 Newton's method needs three or four
    # iterations, and from 2 on it does not converge; None: as they are.
    recurrent_limit: float | None = 0.5
    # They begin uniform in [-scale, scale]; None: normal with deviation width^-1/2. A channel keeps
    # a sign that an input flips, as parity asks for, only with entries beyond 1.
    recurrent_scale: float | None = None
    mlp_residual: bool = True  # False: x = mlp(norm(x)), as a third party's training code has it
    norm_epsilon: float = 1e-6
    solver: Solver = dataclasses.field(default_factory=Solver)
    context: int = 2048  # longest sequence in training; the state itself has no limit

    def __post_init__(self) -> None:
        at_least(self, 1, "vocab_size", "layers", "mlp_width", "context")
        at_least(self, 2, "conv_width")
        multiple_of(self, "heads", "width")
        one_of(self, "cell", ("gru", "lstm"))
        at_least(self, 0, "norm_epsilon")
        above(self, 0, "recurrent_limit", "recurrent_scale")

    def build(self, *, rngs: nnx.Rngs) -> RecurrentLM:
        """A freshly initialised model."""
        return RecurrentLM(
            self,
            functools.partial(ParaRNNBlock, self),
            norm=RMSNorm(self.width, epsilon=self.norm_epsilon),
            embedding_init=truncated_normal(self.width**-0.5),
            rngs=rngs,
        )

    def flops_per_token(self, time: int, depth: None = None, *, training: bool = False) -> float:
        """Multiplications and additions of all matrix products; three times as many in training."""
        mixer = 3 * self.width**2 + 3 * self.width**2 // self.heads
        mixer += self.conv_width * self.width
        mlp = 3 * self.width * self.mlp_width
        forward = 2 * (self.layers * (mixer + mlp) + self.width * self.vocab_size)
        return forward * (3 if training else 1)


class ParaRNNState(NamedTuple):
    """What a block carries from one call to the next."""

    window: Array  # (b w-1 d) float32: the last inputs of the convolution
    hidden: Array  # (b d) or (b 2 d) float32: that of the cell


class ParaRNNBlock(nnx.Module):
    """One layer."""

    def __init__(self, config: ParaRNNLMConfig, rngs: nnx.Rngs):
        d = config.width
        # What writes to the stream shrinks with the number of writers, so that its scale does not
        # grow with depth.
        init, writers = truncated_normal(d**-0.5), 2 * config.layers
        norm = functools.partial(RMSNorm, d, epsilon=config.norm_epsilon)
        self.norm = norm()
        self.input = Linear(d, (2, d), init=init, axes=("embed", None, "mlp"), rngs=rngs)
        kernel = truncated_normal(config.conv_width**-0.5)(rngs.params(), (config.conv_width, d))
        self.conv_kernel = nnx.Param(kernel, axes=("conv", "mlp"))
        self.conv_bias = nnx.Param(jnp.zeros(d), axes=("mlp",))
        cell = ParaRNNConfig(
            cell=config.cell,
            inputs=d,
            width=d,
            heads=config.heads,
            recurrent_limit=config.recurrent_limit,
            recurrent_init="cut_normal",
            recurrent_scale=config.recurrent_scale,
            input_init="kaiming",
            bias_init="zero",
        )
        self.cell = ParaRNN(cell, solver=config.solver, rngs=rngs)
        self.gate_norm = norm()
        self.out = Linear(
            d, d, init=truncated_normal((writers * d) ** -0.5), axes=("mlp", "embed"), rngs=rngs
        )
        self.residual_scale = nnx.Param(jnp.ones(1), axes=(None,))
        self.mlp_norm = norm()
        self.mlp = GatedMLP(
            d,
            config.mlp_width,
            init=init,
            out_init=truncated_normal((writers * config.mlp_width) ** -0.5),
            rngs=rngs,
        )
        self.mlp_residual = config.mlp_residual

    def init_state(self, batch: int) -> ParaRNNState:
        """Zero state, float32."""
        width, d = self.conv_kernel.shape
        return ParaRNNState(jnp.zeros((batch, width - 1, d)), self.cell.init_state(batch))

    def __call__(
        self, x: Array, state: ParaRNNState, *, reset: Array | None = None
    ) -> tuple[Array, ParaRNNState]:
        """Maps x (b t d) to (b t d); `reset` bool (b t), True where a document begins."""
        inner, gate, window = self._cell_input(x, state, reset)
        h, hidden = self.cell(inner, state.hidden, reset=reset)
        y = self.out(self.gate_norm(h) * silu(gate))
        scale = self.residual_scale[...].astype(x.dtype)[None, None]
        x = x * scale + y.astype(x.dtype)
        mixed = self.mlp(self.mlp_norm(x)).astype(x.dtype)
        x = x + mixed if self.mlp_residual else mixed
        return constrain(x, "batch", "time", None), ParaRNNState(window, hidden)

    def measure(
        self, x: Array, state: ParaRNNState, *, reset: Array | None = None
    ) -> dict[str, Array]:
        """What the cell says of itself on these inputs, see `ParaRNN.measure`."""
        inner, _, _ = self._cell_input(x, state, reset)
        return self.cell.measure(inner, state.hidden, reset=reset)

    def _cell_input(
        self, x: Array, state: ParaRNNState, reset: Array | None
    ) -> tuple[Array, Array, Array]:
        """What the cell reads, the gate of what it gives, and the convolution's next window."""
        inputs = self.input(self.norm(x))
        inner, window = causal_conv(
            inputs[:, :, 0], self.conv_kernel[...], self.conv_bias[...], state.window, reset
        )
        return silu(inner), inputs[:, :, 1], window


TINY_GRU = ParaRNNLMConfig(
    vocab_size=272, width=128, layers=4, heads=4, mlp_width=448, context=1024
)
"""Bytes; 1.0 M parameters, about as many as huginn:TINY."""

TINY_LSTM = dataclasses.replace(TINY_GRU, cell="lstm")
"""The same of ParaLSTM cells."""

SMALL_GRU = ParaRNNLMConfig(vocab_size=32768, width=768, layers=9, heads=4, mlp_width=2048)
"""About 90 million parameters; for one accelerator."""

PARAGRU_1B = ParaRNNLMConfig(vocab_size=32000, width=2048, layers=24, heads=4, mlp_width=5632)
"""The "1B" of a third party's training code: 1,274,185,752 parameters. The paper's own sizes, 400M
to 7B, are not published in numbers of layers and channels.
"""

PARALSTM_1B = dataclasses.replace(PARAGRU_1B, cell="lstm")
"""The same of ParaLSTM cells."""
