"""Mamba: a language model whose only mixing over time is a selective state-space recurrence.

    x = embed(tokens);   x = x + mixer(norm(x)) for every layer;   logits = W_head norm(x)

Gu & Dao, Mamba: linear-time sequence modeling with selective state spaces (2023), arXiv:2312.00752.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxrec.layers.activations import Activation, activation
from jaxrec.layers.axes import constrain
from jaxrec.layers.embedding import Embedding
from jaxrec.layers.linear import uniform
from jaxrec.layers.mamba import Mamba, MambaState, log_uniform_step_bias
from jaxrec.layers.norm import RMSNorm
from jaxrec.ops import segments
from jaxrec.ops.depth import RematPolicy, remat_scan


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig:
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
        for field in ("vocab_size", "width", "layers", "inner_width", "step_rank", "state_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"MambaConfig: {field} must be >= 1, got {getattr(self, field)}.")
        if self.conv_width < 2:
            raise ValueError(f"MambaConfig: conv_width must be >= 2, got {self.conv_width}.")
        if self.context < 1:
            raise ValueError(f"MambaConfig: context must be >= 1, got {self.context}.")
        if not 0 < self.step_min <= self.step_max:
            raise ValueError(
                f"MambaConfig: needs 0 < step_min <= step_max, got {self.step_min} and"
                f" {self.step_max}."
            )
        if self.step_init not in ("random", "constant"):
            raise ValueError(
                f"MambaConfig: step_init must be random or constant, got {self.step_init!r}."
            )
        activation(self.activation)

    @property
    def mean_depth(self) -> None:
        """None: nothing is looped."""
        return None

    def build(self, *, rngs: nnx.Rngs) -> "MambaLM":
        """A freshly initialised model."""
        return MambaLM(self, rngs=rngs)

    def sample_depth(self, rng: np.random.Generator) -> None:
        """None: nothing is looped."""
        return None

    def flops_per_token(self, time: int, depth: None = None, *, training: bool = False) -> float:
        """Multiplications and additions of all matrix products; three times as many in training."""
        mixer = 3 * self.width * self.inner_width
        mixer += self.inner_width * (2 * self.step_rank + 2 * self.state_size + self.conv_width)
        forward = 2 * (self.layers * mixer + self.width * self.vocab_size)
        return forward * (3 if training else 1)


class MambaBlock(nnx.Module):
    """A mixer on the normalised stream, added to it."""

    def __init__(self, config: MambaConfig, *, rngs: nnx.Rngs):
        step = config.step_scale * config.step_rank**-0.5
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        self.mixer = Mamba(
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
                jax.nn.initializers.constant(step)
                if config.step_init == "constant"
                else uniform(step)
            ),
            step_bias_init=log_uniform_step_bias(
                config.step_min, config.step_max, config.step_floor
            ),
            rngs=rngs,
        )

    def __call__(
        self, x: Array, state: MambaState, *, reset: Array | None = None
    ) -> tuple[Array, MambaState]:
        """Maps x (b t d) to (b t d); `reset` as in `Mamba`."""
        y, state = self.mixer(self.norm(x), state, reset=reset)
        return constrain(x + y.astype(x.dtype), "batch", "time", None), state


class MambaLMState(NamedTuple):
    """What is carried from one call to the next; its size does not depend on the tokens seen."""

    blocks: MambaState  # of every layer: leaves have a leading axis l
    segment: Array  # int32 (b): segment of the last token; segments.NOTHING before the first


class MambaLM(nnx.Module):
    """The model."""

    def __init__(self, config: MambaConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = jax.nn.initializers.normal(config.init_std)
        self.embedding = Embedding(config.vocab_size, config.width, init=init, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.layers)
        self.blocks = jax.vmap(lambda key: MambaBlock(config, rngs=nnx.Rngs(key)))(keys)
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        self.head = (
            None
            if config.tie_embeddings
            else Embedding(config.vocab_size, config.width, init=init, rngs=rngs)
        )

    def init_state(
        self, batch: int, *, capacity: int | None = None, depth: int | None = None
    ) -> MambaLMState:
        """The state before the first token. It has room for any number of tokens."""
        config = self.config
        shape = (config.layers, batch)
        blocks = MambaState(
            window=jnp.zeros((*shape, config.conv_width - 1, config.inner_width)),
            hidden=jnp.zeros((*shape, config.inner_width, config.state_size)),
        )
        return MambaLMState(blocks, segments.before_the_first(batch))

    def __call__(
        self,
        tokens: Array,
        state: MambaLMState | None = None,
        *,
        segment_ids: Array | None = None,
        remat: RematPolicy = "none",
    ) -> tuple[Array, MambaLMState]:
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
        # What begins anew and has no segments needs no resets.
        needs_resets = state is not None or segment_ids is not None
        if state is None:
            state = self.init_state(tokens.shape[0])
        if segment_ids is None:
            segment_ids = segments.continued(state.segment, tokens.shape[1])
        reset = segments.resets(segment_ids, state.segment) if needs_resets else None

        def body(x: Array, layer: tuple[MambaBlock, MambaState]) -> tuple[Array, MambaState]:
            block, block_state = layer
            return block(x, block_state, reset=reset)

        x = self.embed(tokens)
        with jax.named_scope("blocks"):
            x, blocks = remat_scan(body, x, (self.blocks, state.blocks), remat=remat)
        with jax.named_scope("head"):
            head = self.embedding if self.head is None else self.head
            logits = head.logits(self.norm(x))
        logits = constrain(logits, "batch", "time", "vocab")
        return logits, MambaLMState(blocks, segment_ids[:, -1])

    def embed(self, tokens: Array) -> Array:
        """Tokens (b t) to the stream (b t d)."""
        x = self.embedding(tokens)
        if self.config.residual_in_float32:
            x = x.astype(jnp.float32)
        return constrain(x, "batch", "time", None)


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
