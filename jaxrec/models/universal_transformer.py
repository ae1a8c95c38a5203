"""Universal Transformer: one layer, looped over depth, with an adaptive number of loops if wanted.

    x = sqrt(d) embed(tokens);   x <- layer(x + P + E_t), t = 0 .. T-1;   logits = W_head norm(x)

As a decoder it is a language model, as an encoder it labels every token, and both together map one
sequence to another: the decoder's layer then also attends to the encoder's output. See
`layers.universal` for the stack, `ops.depth.halting` for adaptive computation time.

Dehghani et al., Universal transformers (2018), arXiv:1807.03819; where the text and its published
code (tensor2tensor) differ, defaults are those of the code.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxrec.config import at_least
from jaxrec.layers.axes import constrain
from jaxrec.layers.dropout import dropout
from jaxrec.layers.embedding import Embedding
from jaxrec.layers.recurrent_lm import Unlooped
from jaxrec.layers.universal import Memory, Ponder, Source, StackConfig, UniversalStack
from jaxrec.ops import segments
from jaxrec.ops.depth import RematPolicy
from jaxrec.ops.depth.halting import ponder_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenConfig(StackConfig, Unlooped):
    """A stack with its vocabulary."""

    vocab_size: int
    context: int  # longest sequence in training; random starts keep positions below it
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "vocab_size", "context")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniversalTransformerConfig(TokenConfig):
    """A decoder: a language model."""

    def build(self, *, rngs: nnx.Rngs) -> "UniversalTransformer":
        """A freshly initialised model."""
        return UniversalTransformer(self, rngs=rngs)

    def flops_per_token(self, time: int, depth: None = None, *, training: bool = False) -> float:
        """Multiplications and additions of all matrix products, causal attention counted as half a
        square and an adaptive loop as its most steps; three times as many in training.
        """
        width, inner = self.width, self.mlp_width
        transition = 2 * width * inner
        if self.transition == "conv":
            transition += 3 * width + 5 * inner
        layer = 2 * (4 * width**2 + transition) + 2 * width * time
        loop = 2 * 3 * width**2 if self.join == "concat" else 0
        loop += 2 * width if self.halting != "none" else 0
        forward = self.layers_run * layer + self.steps * loop + 2 * width * self.vocab_size
        return forward * (3 if training else 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniversalEncoderConfig(TokenConfig):
    """An encoder that scores a token at every position."""

    def build(self, *, rngs: nnx.Rngs) -> "UniversalEncoder":
        """A freshly initialised model."""
        return UniversalEncoder(self, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniversalSeq2SeqConfig(TokenConfig):
    """An encoder and a decoder of equal sizes with one embedding."""

    def build(self, *, rngs: nnx.Rngs) -> "UniversalTransformer":
        """A freshly initialised model."""
        return UniversalTransformer(self, rngs=rngs)


class DecoderState(NamedTuple):
    """What a decoder carries from one call to the next."""

    memory: Memory
    source: Source | None


class _Tokens(nnx.Module):
    """Embedding and head."""

    def __init__(self, config: TokenConfig, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(config.width**-0.5)

        def embedding() -> Embedding:
            return Embedding(config.vocab_size, config.width, init=init, rngs=rngs)

        self.config = config
        self.embedding = embedding()
        self.head = None if config.tie_embeddings else embedding()

    def embed(self, tokens: Array, key: Array | None = None) -> Array:
        """sqrt(d) times the vectors of tokens (b t); dropped out with a key."""
        with jax.named_scope("embed"):
            x = self.embedding(tokens)
            x = dropout(x * jnp.asarray(self.config.width**0.5, x.dtype), self.config.dropout, key)
            return constrain(x, "batch", "time", None)

    def predict(self, x: Array) -> Array:
        """Logits (b t vocab), float32."""
        with jax.named_scope("head"):
            return (self.embedding if self.head is None else self.head).logits(x)

    def start(self, key: Array | None, batch: int, length: int) -> Array | None:
        """The first position of each row in training, int32 (b), such that the last one stays in
        the context; None for zero.
        """
        config = self.config
        if config.start != "random" or key is None:
            return None
        room = max(config.context - length, 0)
        return jax.random.randint(key, (batch,), 0, room + 1, jnp.int32)


class UniversalEncoder(_Tokens):
    """The encoder. It has no state: every token may see every other one."""

    def __init__(self, config: UniversalEncoderConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.encoder = UniversalStack(config, causal=False, rngs=rngs)

    def __call__(
        self,
        tokens: Array,
        *,
        is_token: Array | None = None,
        offset: Array | None = None,
        key: Array | None = None,
        differentiable: bool = True,
        remat: RematPolicy = "none",
    ) -> tuple[Array, Ponder | None]:
        """Scores a token at every position.

        Args:
          tokens: int (b t).
          is_token: bool (b t), False for padding, which nobody sees; None: there is none.
          offset: int32 (b), the position of the first token; None: 0.
          key: of dropout; None drops nothing.
          differentiable: False: an adaptive loop ends as soon as it may, without reverse
            derivative.
          remat: what the gradient stores, see `ops.depth.remat_scan`.

        Returns:
          Logits (b t vocab), float32, and with halting how long each position pondered.
        """
        keys = _split(key, 2)
        x, _, ponder = self.encoder(
            self.embed(tokens, keys[0]),
            is_token=is_token,
            offset=offset,
            key=keys[1],
            differentiable=differentiable,
            remat=remat,
        )
        return self.predict(x), ponder

    def train_call(
        self, tokens: Array, *, key: Array, is_token: Array | None = None, **options: Any
    ) -> tuple[Array, Array | None]:
        """Logits, and what each position adds to the loss, see `models.protocol`."""
        keys = _split(key, 2)
        options.setdefault("offset", self.start(keys[0], *tokens.shape))
        logits, ponder = self(tokens, is_token=is_token, key=keys[1], **options)
        return logits, _penalty(self.config, None, ponder, is_token, tokens.shape)


class UniversalTransformer(_Tokens):
    """The decoder, or encoder and decoder. State is a `DecoderState`, or None.

    With an encoder, the decoder attends to a source, which is an argument, or in the state from
    `read`.
    """

    def __init__(
        self, config: UniversalTransformerConfig | UniversalSeq2SeqConfig, *, rngs: nnx.Rngs
    ):
        super().__init__(config, rngs=rngs)
        is_both = isinstance(config, UniversalSeq2SeqConfig)
        self.encoder = UniversalStack(config, causal=False, rngs=rngs) if is_both else None
        self.decoder = UniversalStack(config, causal=True, cross=is_both, rngs=rngs)

    def init_state(self, batch: int, *, capacity: int, depth: int | None = None) -> DecoderState:
        """The state before the first token of a language model, with room for `capacity` tokens.

        Raises:
          ValueError: the model has an encoder; `read` makes its state.
        """
        if self.encoder is not None:
            raise ValueError(
                "UniversalTransformer: this one reads a source. Take its state from"
                " read(source, capacity=...)."
            )
        return DecoderState(self.decoder.init_state(batch, capacity=capacity), None)

    def read(
        self,
        source: Array,
        *,
        capacity: int,
        is_token: Array | None = None,
        offset: Array | None = None,
    ) -> DecoderState:
        """Encodes a source; the state before the first token of what is made of it.

        Args:
          source: int (b s).
          capacity: room for so many tokens.
          is_token: bool (b s), False for padding.
          offset: int32 (b), as in a call.

        Raises:
          ValueError: the model has no encoder.
        """
        encoded, _ = self._encode(source, is_token, offset, None, False, "none")
        memory = self.decoder.init_state(source.shape[0], capacity=capacity)
        return DecoderState(memory, encoded)

    def __call__(
        self,
        tokens: Array,
        state: DecoderState | None = None,
        *,
        segment_ids: Array | None = None,
        source: Array | None = None,
        source_is_token: Array | None = None,
        offset: Array | None = None,
        differentiable: bool | None = None,
        remat: RematPolicy = "none",
    ) -> tuple[Array, DecoderState | None]:
        """Scores the next token at every position.

        Args:
          tokens: int (b t).
          state: of the tokens so far, from `init_state` or `read`; None keeps nothing. More tokens
            than its capacity overwrite its end without a word.
          segment_ids: int (b t), documents packed in a row; see `ops.attention.open_view`. All of
            them attend to the one source, if there is one.
          source: int (b s), of a model with an encoder and without a state.
          source_is_token: bool (b s), False for padding, which nobody sees; None: there is none.
          offset: int32 (b), added to all positions, those of the source included; None: 0.
          differentiable: False: adaptive loops end as soon as they may, without reverse derivative
            (a decoder's with a state only where `UniversalStack.can_leave_out`). None: without a
            state.
          remat: what the gradient stores, see `ops.depth.remat_scan`.

        Returns:
          Logits (b t vocab), float32, and the next state.

        Raises:
          ValueError: a model with an encoder gets no source or gets it twice, one without gets one,
            or the state is one of another batch.
        """
        differentiable = state is None if differentiable is None else differentiable
        run = self._run(
            tokens,
            state,
            segment_ids=segment_ids,
            source=source,
            source_is_token=source_is_token,
            offset=offset,
            differentiable=differentiable,
            remat=remat,
        )
        return run.logits, run.state

    def train_call(
        self,
        tokens: Array,
        *,
        key: Array,
        offset: Array | None = None,
        segment_ids: Array | None = None,
        source: Array | None = None,
        source_is_token: Array | None = None,
        remat: RematPolicy = "none",
    ) -> tuple[Array, Array | None]:
        """Logits with dropout and a random start, and the ponder loss of each position (b t), that
        of its row's source included; None without halting. See `models.protocol`.
        """
        keys = _split(key, 2)
        if offset is None:
            lengths = [tokens.shape[1], 0 if source is None else source.shape[1]]
            offset = self.start(keys[0], tokens.shape[0], max(lengths))
        run = self._run(
            tokens,
            None,
            segment_ids=segment_ids,
            source=source,
            source_is_token=source_is_token,
            offset=offset,
            differentiable=True,
            remat=remat,
            key=keys[1],
        )
        penalty = _penalty(
            self.config, run.ponder, run.source_ponder, source_is_token, tokens.shape
        )
        return run.logits, penalty

    def measure(self, tokens: Array, *, segment_ids: Array | None = None) -> dict[str, Array]:
        """With halting, the means of the loops that counted and of the ponder time over tokens
        whose segment is not 0; otherwise nothing. Of a language model.
        """
        if self.decoder.halt is None:
            return {}
        ponder = self._run(tokens, None, segment_ids=segment_ids, differentiable=False).ponder
        assert ponder is not None, "there is halting"
        is_token = None if segment_ids is None else segment_ids != 0
        return {
            "ponder_steps": ponder_loss(ponder.steps, is_token),
            "ponder_time": ponder_loss(ponder.time, is_token),
        }

    def pondered(self, tokens: Array, **options: Any) -> tuple[Ponder | None, Ponder | None]:
        """How long the positions of the source and of tokens (b t) ponder; options of a call
        without a state.
        """
        run = self._run(tokens, None, differentiable=False, **options)
        return run.source_ponder, run.ponder

    def _run(
        self,
        tokens: Array,
        state: DecoderState | None,
        *,
        segment_ids: Array | None = None,
        source: Array | None = None,
        source_is_token: Array | None = None,
        offset: Array | None = None,
        differentiable: bool,
        remat: RematPolicy = "none",
        key: Array | None = None,
    ) -> "_Run":
        keys = _split(key, 3)
        encoded, source_ponder = (None if state is None else state.source), None
        if source is not None and encoded is not None:
            raise ValueError("UniversalTransformer: the state holds a source already.")
        if source is not None:
            encoded, source_ponder = self._encode(
                source, source_is_token, offset, keys[0], differentiable, remat
            )
        elif self.encoder is not None and encoded is None:
            raise ValueError(
                "UniversalTransformer: a model with an encoder needs a source (b s), or a state"
                " from read(source, capacity=...)."
            )
        if state is not None:
            segments.check_batch(state.memory.kv.segment, tokens.shape[0])
        x, memory, ponder = self.decoder(
            self.embed(tokens, keys[1]),
            None if state is None else state.memory,
            segment_ids=segment_ids,
            source=encoded,
            offset=offset,
            # How long a text becomes is not known while it is written.
            length=self.config.context,
            differentiable=differentiable,
            key=keys[2],
            remat=remat,
        )
        state = None if memory is None else DecoderState(memory, encoded)
        return _Run(self.predict(x), state, ponder, source_ponder)

    def _encode(
        self,
        source: Array,
        is_token: Array | None,
        offset: Array | None,
        key: Array | None,
        differentiable: bool,
        remat: RematPolicy,
    ) -> tuple[Source, Ponder | None]:
        if self.encoder is None:
            raise ValueError("UniversalTransformer: a model without an encoder reads no source.")
        keys = _split(key, 2)
        with jax.named_scope("encoder"):
            x, _, ponder = self.encoder(
                self.embed(source, keys[0]),
                is_token=is_token,
                offset=offset,
                differentiable=differentiable,
                key=keys[1],
                remat=remat,
            )
        if is_token is None:
            is_token = jnp.ones(source.shape, jnp.bool_)
        return self.decoder.read(x, is_token), ponder


class _Run(NamedTuple):
    """What came out of a decoder."""

    logits: Array
    state: DecoderState | None
    ponder: Ponder | None
    source_ponder: Ponder | None


def _split(key: Array | None, count: int) -> Any:
    return (None,) * count if key is None else jax.random.split(key, count)


def _penalty(
    config: TokenConfig,
    ponder: Ponder | None,
    row: Ponder | None,
    row_is_token: Array | None,
    shape: tuple[int, ...],
) -> Array | None:
    """The ponder loss of each position (b t): its own time, and the mean one of its row's source,
    without padding.
    """
    if ponder is None and row is None:
        return None
    penalty = jnp.zeros(shape)
    if ponder is not None:
        penalty = penalty + ponder.time
    if row is not None:
        is_token = jnp.ones(row.time.shape, jnp.bool_) if row_is_token is None else row_is_token
        penalty = penalty + jax.vmap(ponder_loss)(row.time, is_token)[:, None]
    return config.ponder_weight * penalty


TINY = UniversalTransformerConfig(
    vocab_size=272,
    width=192,
    heads=6,
    mlp_width=768,
    steps=6,
    context=1024,
    halting="position",
    rule="copy-halted",
)
"""Bytes; an adaptive language model that learns real text in minutes on two CPU cores."""

UT_TINY = UniversalSeq2SeqConfig(
    vocab_size=32768, width=128, heads=4, mlp_width=512, steps=8, context=256
)
"""The published sizes, for translation, with a vocabulary of about the one used there."""
UT_SMALL = dataclasses.replace(UT_TINY, width=512, heads=8, mlp_width=2048, steps=6, dropout=0.1)
UT_BASE = dataclasses.replace(UT_SMALL, width=1024, heads=16, mlp_width=4096, dropout=0.3)
UT_BIG = dataclasses.replace(UT_BASE, width=2048, heads=16, mlp_width=8192)
"""Adaptive ones halt by position within at most 2 x 6 = 12 steps: see `adaptive`."""


def adaptive(config: TokenConfig, *, steps: int | None = None) -> Any:
    """The published adaptive variant of a configuration: positions halt by themselves, after at
    most twice its steps if not said otherwise.
    """
    return dataclasses.replace(
        config, halting="position", steps=2 * config.steps if steps is None else steps
    )
