"""A language model without attention: Griffin's recurrent blocks all the way ("Hawk").

    x = x + recurrent_block(norm(x));   x = x + mlp(norm(x));   logits = soft_cap(embed^T norm(x))

De et al., Griffin: mixing gated linear recurrences with local attention (2024), arXiv:2402.19427.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxrec.layers.axes import constrain
from jaxrec.layers.embedding import Embedding
from jaxrec.layers.linear import truncated_normal
from jaxrec.layers.mlp import GatedMLP
from jaxrec.layers.norm import RMSNorm
from jaxrec.layers.residual import ResidualBlock
from jaxrec.layers.rglru import RecurrentBlock, RecurrentState
from jaxrec.ops import segments
from jaxrec.ops.depth import RematPolicy, remat_scan


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRNNConfig:
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
        if self.recurrent_width % self.heads:
            raise ValueError(
                f"LinearRNNConfig: recurrent_width must be a multiple of heads,"
                f" got {self.recurrent_width} and {self.heads}."
            )
        for field in ("vocab_size", "width", "mlp_width", "layers", "context"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"LinearRNNConfig: {field} must be >= 1, got {getattr(self, field)}."
                )
        if self.conv_width < 2:
            raise ValueError(f"LinearRNNConfig: conv_width must be >= 2, got {self.conv_width}.")

    @property
    def mean_depth(self) -> None:
        """None: nothing is looped."""
        return None

    def build(self, *, rngs: nnx.Rngs) -> "LinearRNN":
        """A freshly initialised model."""
        return LinearRNN(self, rngs=rngs)

    def sample_depth(self, rng: np.random.Generator) -> None:
        """None: nothing is looped."""
        return None

    def flops_per_token(self, time: int, depth: None = None, *, training: bool = False) -> float:
        """Multiplications and additions of all matrix products; three times as many in training."""
        gates = 2 * self.recurrent_width**2 // self.heads
        recurrent = 3 * self.width * self.recurrent_width + gates
        recurrent += self.conv_width * self.recurrent_width
        mlp = 3 * self.width * self.mlp_width
        forward = 2 * (self.layers * (recurrent + mlp) + self.width * self.vocab_size)
        return forward * (3 if training else 1)


def _block(config: LinearRNNConfig, *, rngs: nnx.Rngs) -> ResidualBlock:
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
        config.width,
        epsilon=config.norm_epsilon,
    )


class LinearRNNState(NamedTuple):
    """What is carried from one call to the next; its size does not depend on the tokens seen."""

    blocks: RecurrentState  # of every layer: leaves have a leading axis l
    segment: Array  # int32 (b): segment of the last token; segments.NOTHING before the first


class LinearRNN(nnx.Module):
    """The model."""

    def __init__(self, config: LinearRNNConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(
            config.vocab_size, config.width, init=truncated_normal(config.width**-0.5), rngs=rngs
        )
        keys = jax.random.split(rngs.params(), config.layers)
        self.blocks = jax.vmap(lambda key: _block(config, rngs=nnx.Rngs(key)))(keys)
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon, unit_offset=True)

    def init_state(
        self, batch: int, *, capacity: int | None = None, depth: int | None = None
    ) -> LinearRNNState:
        """The state before the first token. It has room for any number of tokens."""
        config = self.config
        shape = (config.layers, batch)
        blocks = RecurrentState(
            window=jnp.zeros((*shape, config.conv_width - 1, config.recurrent_width)),
            hidden=jnp.zeros((*shape, config.recurrent_width)),
        )
        return LinearRNNState(blocks, segments.before_the_first(batch))

    def __call__(
        self,
        tokens: Array,
        state: LinearRNNState | None = None,
        *,
        segment_ids: Array | None = None,
        remat: RematPolicy = "none",
    ) -> tuple[Array, LinearRNNState]:
        """Scores the next token at every position.

        Args:
          tokens: int (b t).
          state: from `init_state` or the call before; None begins anew.
          segment_ids: int (b t) >= 0; where the id changes the state begins anew. None: the last
            segment goes on.
          remat: what the gradient stores, see `ops.depth.remat_scan`.

        Returns:
          Logits (b t vocab), float32, and the next state.
        """
        config = self.config
        if state is None:
            # Zeros that follow the tokens' sharding, as a carry must.
            state = self.init_state(tokens.shape[0])
        if segment_ids is None:
            segment_ids = segments.continued(state.segment, tokens.shape[1])
        reset = segments.resets(segment_ids, state.segment)

        def body(
            x: Array, layer: tuple[ResidualBlock, RecurrentState]
        ) -> tuple[Array, RecurrentState]:
            block, block_state = layer
            return block(x, block_state, reset=reset)

        x = self.embedding(tokens)
        x = constrain(x * jnp.asarray(config.width**0.5, x.dtype), "batch", "time", None)
        with jax.named_scope("blocks"):
            x, blocks = remat_scan(body, x, (self.blocks, state.blocks), remat=remat)
        with jax.named_scope("head"):
            logits = self.embedding.logits(self.norm(x))
            if config.logits_soft_cap is not None:
                logits = config.logits_soft_cap * jnp.tanh(logits / config.logits_soft_cap)
        logits = constrain(logits, "batch", "time", "vocab")
        return logits, LinearRNNState(blocks, segment_ids[:, -1])


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
