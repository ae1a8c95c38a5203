"""RecurrentGemma: Griffin, a language model of RG-LRU blocks with local attention in between.

    x = x + mixer(norm(x));   x = x + mlp(norm(x));   logits = soft_cap(embed^T norm(x))

The mixers repeat a pattern, two recurrent blocks and one of attention in the published models.
Attention has one key-value head, rotates half of each head and sees a window of the last tokens, so
that the state never grows beyond that window.

De et al., Griffin: mixing gated linear recurrences with local attention (2024), arXiv:2402.19427;
Botev et al., RecurrentGemma: moving past transformers (2024), arXiv:2404.07839.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxrec.config import above, at_least, multiple_of
from jaxrec.layers.activations import Activation, activation
from jaxrec.layers.attention import Attention
from jaxrec.layers.axes import constrain
from jaxrec.layers.embedding import Embedding
from jaxrec.layers.linear import truncated_normal
from jaxrec.layers.mlp import GatedMLP
from jaxrec.layers.norm import RMSNorm
from jaxrec.layers.recurrent_lm import Unlooped
from jaxrec.layers.residual import ResidualBlock
from jaxrec.layers.rglru import RecurrentBlock, RecurrentState
from jaxrec.ops import attention, notes, rotary, segments
from jaxrec.ops.depth import RematPolicy, remat_scan, remat_step

Mixer = Literal["recurrent", "attention"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentGemmaConfig(Unlooped):
    """Sizes, in channels, layers and tokens."""

    vocab_size: int
    width: int
    recurrent_width: int  # channels of the RG-LRU
    heads: int  # of attention, each width / heads wide; also blocks of the RG-LRU's gate matrices
    mlp_width: int  # inner width of the gated MLP
    layers: int
    window: int  # tokens that attention sees, the present one included
    context: int  # longest sequence in training; the state itself has no limit
    pattern: tuple[Mixer, ...] = ("recurrent", "recurrent", "attention")  # repeated over layers
    kv_heads: int = 1
    conv_width: int = 4
    activation: Activation = "gelu_tanh"
    attention_bias: bool = False  # of the projections to queries, keys and values
    rotary_base: float = 10000.0
    rotary_fraction: float = 0.5  # of each head, the first channels
    logits_soft_cap: float | None = 30.0  # logits are cap * tanh(logits / cap)
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        at_least(self, 1, "vocab_size", "mlp_width", "layers", "window", "context")
        at_least(self, 2, "conv_width")
        at_least(self, 0, "norm_epsilon", "rotary_fraction")
        above(self, 0, "rotary_base", "logits_soft_cap")
        multiple_of(self, "heads", "width", "recurrent_width")
        multiple_of(self, "kv_heads", "heads")
        if not self.pattern or not set(self.pattern) <= set(get_args(Mixer)):
            raise ValueError(
                f"RecurrentGemmaConfig: pattern must be made of {get_args(Mixer)},"
                f" got {self.pattern}."
            )
        if "attention" in self.mixers and (self.rotary_width % 2 or not self.rotary_width):
            raise ValueError(
                "RecurrentGemmaConfig: rotary_fraction of a head must be an even number of"
                f" channels, got {self.rotary_fraction} of {self.head_width}."
            )
        activation(self.activation)

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """What mixes over time in each layer."""
        return (self.pattern * self.layers)[: self.layers]

    @property
    def head_width(self) -> int:
        """Channels of one head of attention."""
        return self.width // self.heads

    @property
    def rotary_width(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.head_width * self.rotary_fraction)

    @property
    def embedding_scale(self) -> float:
        """sqrt(width) as a bfloat16 number, which is what the published weights expect."""
        return float(np.asarray(self.width**0.5, jnp.bfloat16))

    def build(self, *, rngs: nnx.Rngs) -> "RecurrentGemma":
        """A freshly initialised model."""
        return RecurrentGemma(self, rngs=rngs)

    def flops_per_token(self, time: int, depth: None = None, *, training: bool = False) -> float:
        """Multiplications and additions of all matrix products, of attention those within the
        window; three times as many in training.
        """
        recurrent = 3 * self.width * self.recurrent_width + self.conv_width * self.recurrent_width
        recurrent += 2 * self.recurrent_width**2 // self.heads
        seen = time / 2 if time <= self.window else self.window * (1 - self.window / (2 * time))
        local = 2 * self.width**2 + 2 * self.width * self.head_width * self.kv_heads
        mixing = {"recurrent": float(recurrent), "attention": local + 2 * seen * self.width}
        forward = sum(mixing[mixer] for mixer in self.mixers)
        forward += self.layers * 3 * self.width * self.mlp_width + self.width * self.vocab_size
        return 2 * forward * (3 if training else 1)


def _block(config: RecurrentGemmaConfig, mixer: Mixer, *, rngs: nnx.Rngs) -> ResidualBlock:
    # What writes to the stream shrinks with the number of writers, so that its scale does not grow
    # with depth.
    writers = 2 * config.layers
    init = truncated_normal(config.width**-0.5)
    act = activation(config.activation)
    mixing: Any
    if mixer == "recurrent":
        mixing = RecurrentBlock(
            config.width,
            config.recurrent_width,
            config.heads,
            conv_width=config.conv_width,
            activation=act,
            init=init,
            out_init=truncated_normal((writers * config.recurrent_width) ** -0.5),
            rngs=rngs,
        )
    else:
        mixing = Attention(
            config.width,
            config.heads,
            kv_heads=config.kv_heads,
            bias=config.attention_bias,
            out_bias=True,
            rotary_base=config.rotary_base,
            rotary_width=config.rotary_width,
            window=config.window,
            init=init,
            out_init=truncated_normal((writers * config.width) ** -0.5),
            rngs=rngs,
        )
    mlp = GatedMLP(
        config.width,
        config.mlp_width,
        init=init,
        out_init=truncated_normal((writers * config.mlp_width) ** -0.5),
        activation=act,
        bias=True,
        rngs=rngs,
    )
    return ResidualBlock(mixing, mlp, norm=functools.partial(_norm, config))


def _norm(config: RecurrentGemmaConfig) -> RMSNorm:
    return RMSNorm(config.width, epsilon=config.norm_epsilon, unit_offset=True)


class Stretch(NamedTuple):
    """What all layers of one call share."""

    reset: Array  # bool (b t)
    view: attention.View
    angles: rotary.Rotation | None  # None: no layer attends


class Group(nnx.Module):
    """Several layers in a row: the pattern, or the beginning of it."""

    def __init__(self, config: RecurrentGemmaConfig, mixers: tuple[Mixer, ...], *, rngs: nnx.Rngs):
        self.blocks = nnx.List([_block(config, mixer, rngs=rngs) for mixer in mixers])
        self.mixers = mixers

    def __call__(
        self,
        x: Array,
        states: RecurrentState,
        cache: attention.KVCache | None,
        slot: Array,
        stretch: Stretch,
    ) -> tuple[Array, RecurrentState, attention.KVCache | None, Array]:
        """Maps x (b t d) to (b t d).

        Args:
          x: the stream (b t d).
          states: of the recurrent blocks, in order: leaves (l b ...).
          cache: keys and values of all attention layers, or None.
          slot: where in the cache the first of these layers keeps its own.
          stretch: what layers share.

        Returns:
          The stream, the next states and cache, and the first slot of the layer that follows.
        """
        after: list[RecurrentState] = []
        for block, mixer in zip(self.blocks, self.mixers, strict=True):
            if mixer == "recurrent":
                state = jax.tree.map(lambda leaf: leaf[len(after)], states)
                x, state = block(x, state, reset=stretch.reset)
                after.append(state)
            else:
                options = {"view": stretch.view, "angles": stretch.angles}
                x, cache = block(x, cache, slot=slot, **options)
                slot = slot + 1
            notes.note("stream", x)
        if after:
            states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *after)
        return x, states, cache, slot


class RecurrentGemmaState(NamedTuple):
    """What is carried from one call to the next; its size is bounded by the window."""

    groups: RecurrentState  # of the recurrent blocks in whole patterns: leaves (l pattern b ...)
    tail: RecurrentState  # of those in the pattern that is cut short: leaves (l b ...)
    cache: attention.KVCache  # a ring, with one slot per attention layer
    segment: Array  # int32 (b): segment of the last token; segments.NOTHING before the first


class RecurrentGemma(nnx.Module):
    """The model."""

    def __init__(self, config: RecurrentGemmaConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = truncated_normal(config.width**-0.5)
        self.embedding = Embedding(config.vocab_size, config.width, init=init, rngs=rngs)
        whole, cut = divmod(config.layers, len(config.pattern))
        keys = jax.random.split(rngs.params(), max(whole, 1))
        self.groups = (
            jax.vmap(lambda key: Group(config, config.pattern, rngs=nnx.Rngs(key)))(keys)
            if whole
            else None
        )
        self.tail = Group(config, config.pattern[:cut], rngs=rngs) if cut else None
        self.norm = _norm(config)
        self.head = (
            None
            if config.tie_embeddings
            else Embedding(config.vocab_size, config.width, init=init, rngs=rngs)
        )

    def _zero_states(self, batch: int) -> tuple[RecurrentState, RecurrentState]:
        """States of the recurrent blocks, of whole patterns and of the one that is cut short."""
        config = self.config
        whole, cut = divmod(config.layers, len(config.pattern))

        def zeros(*leading: int) -> RecurrentState:
            return RecurrentState(
                window=jnp.zeros((*leading, batch, config.conv_width - 1, config.recurrent_width)),
                hidden=jnp.zeros((*leading, batch, config.recurrent_width)),
            )

        return (
            zeros(whole, config.pattern.count("recurrent")),
            zeros(config.pattern[:cut].count("recurrent")),
        )

    def init_state(
        self, batch: int, *, capacity: int | None = None, depth: int | None = None
    ) -> RecurrentGemmaState:
        """The state before the first token, with room for `capacity` tokens if they are fewer than
        the window, and for any number otherwise.
        """
        config = self.config
        cache = attention.init_cache(
            config.mixers.count("attention"),
            batch,
            min(capacity or config.window, config.window),
            config.kv_heads,
            config.head_width,
            self.embedding.table[...].dtype,
        )
        return RecurrentGemmaState(
            *self._zero_states(batch), cache, segments.before_the_first(batch)
        )

    def __call__(
        self,
        tokens: Array,
        state: RecurrentGemmaState | None = None,
        *,
        segment_ids: Array | None = None,
        remat: RematPolicy = "none",
    ) -> tuple[Array, RecurrentGemmaState | None]:
        """Scores the next token at every position.

        Args:
          tokens: int (b t).
          state: from `init_state` or the call before; None begins anew and keeps nothing.
          segment_ids: int (b t) >= 0; where the id changes a document begins that sees nothing of
            the one before. None: the last segment goes on.
          remat: what the gradient stores, see `ops.depth.remat_scan`; a step is a whole pattern.

        Returns:
          Logits (b t vocab), float32, and the next state.
        """
        x, after = self.run(tokens, state, segment_ids=segment_ids, remat=remat)
        with jax.named_scope("head"):
            head = self.embedding if self.head is None else self.head
            logits = head.logits(self.norm(x), soft_cap=self.config.logits_soft_cap)
        return logits, after

    def embed(self, tokens: Array) -> Array:
        """Tokens (b t) to the stream (b t d)."""
        x = self.embedding(tokens)
        scale = jnp.asarray(self.config.embedding_scale, x.dtype)
        return constrain(x * scale, "batch", "time", None)

    def run(
        self,
        tokens: Array,
        state: RecurrentGemmaState | None = None,
        *,
        segment_ids: Array | None = None,
        remat: RematPolicy = "none",
    ) -> tuple[Array, RecurrentGemmaState | None]:
        """The stream after the last layer, (b t d), and the next state; arguments as for a call."""
        batch, time = tokens.shape
        if state is None:
            (groups, tail), cache = self._zero_states(batch), None
            previous = segments.before_the_first(batch)
        else:
            groups, tail, cache, previous = state
        view, cache = attention.open_view(
            cache, (batch, time), segment_ids, window=self.config.window
        )
        if segment_ids is None:
            segment_ids = segments.continued(previous, time)
        angles = None
        if "attention" in self.config.mixers:  # else a head may have any width
            width, base = self.config.rotary_width, self.config.rotary_base
            angles = rotary.rotation(view.positions, width, base)
        stretch = Stretch(segments.resets(segment_ids, previous), view, angles)

        def body(carry: Any, layers: tuple[Group, RecurrentState]) -> tuple[Any, RecurrentState]:
            x, cache, slot = carry
            group, states = layers
            x, states, cache, slot = group(x, states, cache, slot, stretch)
            return (x, cache, slot), states

        x, slot = self.embed(tokens), jnp.zeros((), jnp.int32)
        with jax.named_scope("blocks"):
            if self.groups is not None:
                (x, cache, slot), groups = remat_scan(
                    body, (x, cache, slot), (self.groups, groups), remat=remat
                )
            if self.tail is not None:
                last = remat_step(body, remat=remat)
                (x, cache, slot), tail = last((x, cache, slot), (self.tail, tail))
        if state is None or cache is None:
            return x, None
        return x, RecurrentGemmaState(groups, tail, cache, segment_ids[:, -1])


TINY = RecurrentGemmaConfig(
    vocab_size=272,
    width=128,
    recurrent_width=128,
    heads=4,
    mlp_width=384,
    layers=5,
    window=256,
    context=1024,
)
"""Bytes; 1.1 M parameters, about as many as huginn:TINY."""

SMALL = RecurrentGemmaConfig(
    vocab_size=32768,
    width=768,
    recurrent_width=768,
    heads=12,
    mlp_width=2304,
    layers=9,
    window=1024,
    context=4096,
)
"""About 90 million parameters; for one accelerator."""

RECURRENTGEMMA_2B = RecurrentGemmaConfig(
    vocab_size=256000,
    width=2560,
    recurrent_width=2560,
    heads=10,
    mlp_width=7680,
    layers=26,
    window=2048,
    context=8192,
)
"""The published recurrentgemma-2b: 2,682,862,080 parameters."""
