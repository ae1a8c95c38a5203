"""The shape that recurrent language models share: an embedding, a stack of equal blocks, a head.

    x = norm_0(scale * embed(tokens));   x, state_l = block_l(x, state_l);   logits = W_head norm(x)

What is particular to a system is its block, `y, state = block(x, state, reset=reset)`; where the
stream is halved now and then, the block takes a `Halving` too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer

from jaxrec.layers.axes import constrain
from jaxrec.layers.embedding import Embedding
from jaxrec.ops import notes, segments
from jaxrec.ops.depth import RematPolicy, remat_scan


class Unlooped:
    """What a configuration says of depth when nothing is looped, see `models.protocol`."""

    @property
    def mean_depth(self) -> None:
        """None: nothing is looped."""
        return None

    def sample_depth(self, rng: np.random.Generator) -> None:
        """None: nothing is looped."""
        return None


class RecurrentLMState(NamedTuple):
    """What is carried from one call to the next; its size does not depend on the tokens seen."""

    blocks: Any  # the state of every block: leaves have a leading axis l
    segment: Array  # int32 (b): segment of the last token; segments.NOTHING before the first


class Halving(NamedTuple):
    """Of a stream that is halved now and then, the part that one block meets, powers of two."""

    share: Array  # of what the block writes to the stream, as much as is left of the embedding
    kept: Array  # of the stream behind the block: 1 or 1/2


class RecurrentLM(nnx.Module):
    """The model.

    Args:
      config: has vocab_size, width and layers, and is kept for those who ask for it.
      block: makes a block from rngs.
      norm: of the stream that the head reads.
      embedding_init: of the embedding.
      head_init: of a head of its own; None: as the embedding.
      embedding_norm: of what is looked up, where there is one.
      tie_embeddings: the head is the embedding.
      embedding_scale: factor on what is looked up.
      soft_cap: logits are cap * tanh(logits / cap).
      stream_dtype: of the stream between blocks; None: that of the weights.
      first_resets: the first token of all counts as a reset, for blocks that tell a sequence's
        first step from a step on a zero state.
      halve_every: blocks behind which the stream is halved; 0: never. Blocks then take `halving`.
    """

    def __init__(
        self,
        config: Any,
        block: Callable[[nnx.Rngs], nnx.Module],
        *,
        norm: nnx.Module,
        embedding_init: Initializer,
        head_init: Initializer | None = None,
        embedding_norm: nnx.Module | None = None,
        tie_embeddings: bool = True,
        embedding_scale: float = 1.0,
        soft_cap: float | None = None,
        stream_dtype: Any = None,
        first_resets: bool = False,
        halve_every: int = 0,
        rngs: nnx.Rngs,
    ):
        def embedding(init: Initializer) -> Embedding:
            return Embedding(config.vocab_size, config.width, init=init, rngs=rngs)

        self.config = config
        self.embedding = embedding(embedding_init)
        self.embedding_norm = embedding_norm
        keys = jax.random.split(rngs.params(), config.layers)
        self.blocks = jax.vmap(lambda key: block(nnx.Rngs(key)))(keys)
        self.norm = norm
        self.head = None if tie_embeddings else embedding(head_init or embedding_init)
        self.embedding_scale, self.soft_cap = embedding_scale, soft_cap
        self.stream_dtype, self.first_resets = stream_dtype, first_resets
        self.halve_every = halve_every

    def init_state(
        self, batch: int, *, capacity: int | None = None, depth: int | None = None
    ) -> RecurrentLMState:
        """The state before the first token. It has room for any number of tokens."""
        blocks = jax.vmap(lambda block: block.init_state(batch))(self.blocks)
        return RecurrentLMState(blocks, segments.before_the_first(batch))

    def __call__(
        self,
        tokens: Array,
        state: RecurrentLMState | None = None,
        *,
        segment_ids: Array | None = None,
        remat: RematPolicy = "none",
    ) -> tuple[Array, RecurrentLMState]:
        """Scores the next token at every position.

        Args:
          tokens: int (b t).
          state: from `init_state` or the call before; None begins anew.
          segment_ids: int (b t) >= 0; where the id changes the state begins anew. None: the last
            segment goes on.
          remat: what the gradient stores, see `ops.depth.remat_scan`.

        Returns:
          Logits (b t vocab), float32, and the next state.

        Raises:
          ValueError: the state is one of another batch.
        """
        needs_resets = self.first_resets or state is not None or segment_ids is not None
        if state is None:
            state = self.init_state(tokens.shape[0])
        segments.check_batch(state.segment, tokens.shape[0])
        if segment_ids is None:
            segment_ids = segments.continued(state.segment, tokens.shape[1])
        reset = segments.resets(segment_ids, state.segment) if needs_resets else None

        def body(x: Array, layer: tuple[Any, Any, dict[str, Halving]]) -> tuple[Array, Any]:
            block, block_state, options = layer
            x, block_state = block(x, block_state, reset=reset, **options)
            notes.note("stream", x)
            return x, block_state

        x = self.embed(tokens)
        with jax.named_scope("blocks"):
            layers = self.blocks, state.blocks, self.block_options()
            x, blocks = remat_scan(body, x, layers, remat=remat)
        with jax.named_scope("head"):
            head = self.embedding if self.head is None else self.head
            logits = head.logits(self.norm(x), soft_cap=self.soft_cap)
        return logits, RecurrentLMState(blocks, segment_ids[:, -1])

    def block_options(self) -> dict[str, Halving]:
        """What blocks take beside the stream, their states and resets: leaves have a leading axis
        l.
        """
        if not self.halve_every:
            return {}
        halved = np.arange(self.config.layers + 1) // self.halve_every
        share, kept = 0.5 ** halved[:-1], 0.5 ** np.diff(halved)
        return {"halving": Halving(*(jnp.asarray(x, jnp.float32) for x in (share, kept)))}

    def measure(self, tokens: Array, *, segment_ids: Array | None = None) -> dict[str, Array]:
        """Scalars that the blocks give on these tokens, of each the largest over layers; none if
        the blocks have no `measure`. Arguments as of a call without a state.
        """
        if not hasattr(self.blocks, "measure"):
            return {}
        state = self.init_state(tokens.shape[0])
        if segment_ids is None:
            segment_ids = segments.continued(state.segment, tokens.shape[1])
        reset = segments.resets(segment_ids, state.segment)

        def body(x: Array, layer: tuple[Any, Any, Any]) -> tuple[Array, dict[str, Array]]:
            block, state, options = layer
            found = block.measure(x, state, reset=reset)
            return block(x, state, reset=reset, **options)[0], found

        layers = self.blocks, state.blocks, self.block_options()
        _, found = jax.lax.scan(body, self.embed(tokens), layers)
        return {name: jnp.max(each, axis=0) for name, each in found.items()}

    def embed(self, tokens: Array) -> Array:
        """Tokens (b t) to the stream (b t d)."""
        x = self.embedding(tokens)
        if self.stream_dtype is not None:
            x = x.astype(self.stream_dtype)
        if self.embedding_scale != 1:
            x = x * jnp.asarray(self.embedding_scale, x.dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return constrain(x, "batch", "time", None)
