"""HRM: two stacks of blocks that refine an answer at two speeds, segment after segment.

With z_H and z_L the slow and the fast state (b t d) and x the embedded puzzle, a segment is

    H times:  L times  z_L <- low(z_L + z_H + x),   then  z_H <- high(z_H + z_L)
    logits = W z_H,   (q_halt, q_continue) = W_q z_H at the first position + b

where the gradient passes through the last call of each stack only. Segments follow each other on
the same puzzle, with states that carry no gradient from one to the next, until q_halt is the larger
one: deep supervision, and halting learned as Q-learning. What is carried is a value, `Carry`.

Wang et al., Hierarchical reasoning model (2025), arXiv:2506.21734, section 2. With `low_backprop`
= `low_cycles` the gradient passes through all calls of the last cycle, as in Jolicoeur-Martineau,
Less is more: recursive reasoning with tiny networks (2025), arXiv:2510.04871, section 4.
"""

import dataclasses
import functools
from typing import Generic, Literal, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxrec.config import at_least, multiple_of, one_of
from jaxrec.layers.attention import Attention
from jaxrec.layers.axes import constrain
from jaxrec.layers.embedding import Embedding
from jaxrec.layers.linear import Linear, normal_cut_at_two
from jaxrec.layers.mlp import GatedMLP
from jaxrec.layers.norm import RMSNorm
from jaxrec.ops import attention, notes, rotary
from jaxrec.ops.depth import RematPolicy, iterate, remat_scan

A = TypeVar("A", Array, np.ndarray)
Positions = Literal["rotary", "learned"]
Normaliser = Literal["stablemax", "softmax"]
MLP_MULTIPLE = 256
"""The inner width of the MLP is a multiple of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HRMConfig:
    """Sizes and options."""

    vocab_size: int
    length: int  # tokens of a puzzle
    width: int
    heads: int  # width / heads must be even
    puzzles: int = 1  # puzzles with a vector of their own
    puzzle_width: int = 0  # size of those vectors, which become tokens in front; 0: none
    high_layers: int = 4
    low_layers: int = 4
    expansion: float = 4.0  # of the MLP, whose inner width is 2/3 of it, rounded up
    high_cycles: int = 2  # H
    low_cycles: int = 2  # L
    high_backprop: int = 1  # the gradient passes through so many of the last calls of `high`
    low_backprop: int = 1  # and, for each of them, through so many of the last calls of `low`
    max_segments: int = 16  # M
    exploration: float = 0.1  # share of rows that must go on for a drawn number of segments
    positions: Positions = "rotary"
    rotary_base: float = 10000.0
    normaliser: Normaliser = "stablemax"  # of the loss
    norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        at_least(self, 1, "vocab_size", "length", "puzzles", "high_layers", "low_layers")
        at_least(self, 1, "high_cycles", "low_cycles", "high_backprop", "low_backprop")
        at_least(self, 1, "max_segments", "expansion")
        at_least(self, 0, "puzzle_width", "exploration")
        multiple_of(self, "heads", "width")
        one_of(self, "positions", get_args(Positions))
        one_of(self, "normaliser", get_args(Normaliser))
        if self.width // self.heads % 2:
            raise ValueError(
                f"HRMConfig: width / heads must be even, got {self.width} / {self.heads}."
            )
        if self.exploration > 1:
            raise ValueError(f"HRMConfig: exploration must be <= 1, got {self.exploration}.")

    @property
    def mlp_width(self) -> int:
        """Inner width of the gated MLP."""
        return -(-round(self.expansion * self.width * 2 / 3) // MLP_MULTIPLE) * MLP_MULTIPLE

    @property
    def puzzle_tokens(self) -> int:
        """Positions that the vector of a puzzle takes, in front of its tokens."""
        return -(-self.puzzle_width // self.width)

    def flops_per_segment(self, batch: int) -> float:
        """Multiplications and additions of a training step's matrix products: the segment, the one
        that gives the target, and twice as many again for each block that the gradient passes
        through.
        """
        length = self.length + self.puzzle_tokens
        block = 2 * (4 * self.width**2 + 3 * self.width * self.mlp_width)
        block += 4 * length * self.width
        run = self.high_cycles * (self.low_cycles * self.low_layers + self.high_layers)
        graded = self.high_backprop * (self.low_backprop * self.low_layers + self.high_layers)
        head = 2 * self.width * self.vocab_size
        return batch * length * (2 * (run + graded) * block + 3 * head)

    def build(self, *, rngs: nnx.Rngs) -> "HRM":
        """A freshly initialised model."""
        return HRM(self, rngs=rngs)


class Latent(NamedTuple):
    """The two states, (b t d) in the dtype of the weights; t counts the tokens in front too."""

    high: Array
    low: Array


class Rows(NamedTuple, Generic[A]):
    """Puzzles with their answers; in NumPy until they are on a device."""

    tokens: A  # int32 (b s)
    labels: A  # int32 (b s); IGNORED where nothing is asked
    puzzle: A  # int32 (b): which vector is theirs


class Carry(NamedTuple):
    """What goes from one segment to the next."""

    latent: Latent
    steps: Array  # int32 (b): segments that the row has had
    halted: Array  # bool (b): the next segment begins with another puzzle
    rows: Rows[Array]


class Fixed(nnx.Variable):
    """Numbers of a model that are drawn once and not trained."""


class Table(nnx.Variable):
    """Rows of which a step reads and trains few; see `training.optim.sign_sgd_rows`."""


class PostNormBlock(nnx.Module):
    """h = norm(h + attention(h)), then h = norm(h + mlp(h)); norms without scale."""

    def __init__(self, config: HRMConfig, *, rngs: nnx.Rngs):
        width, inner = config.width, config.mlp_width
        init = normal_cut_at_two(width**-0.5)
        self.attention = Attention(
            width,
            config.heads,
            rotary_base=config.rotary_base if config.positions == "rotary" else None,
            causal=False,
            init=init,
            rngs=rngs,
        )
        out_init = normal_cut_at_two(inner**-0.5)
        self.mlp = GatedMLP(width, inner, init=init, out_init=out_init, rngs=rngs)
        self.norm = RMSNorm(width, epsilon=config.norm_epsilon, scale=False)

    def __call__(self, x: Array, view: attention.View, angles: rotary.Rotation | None) -> Array:
        """Maps x (b t d) to (b t d)."""
        y, _ = self.attention(x, view=view, angles=angles)
        x = self.norm(x + y)
        return constrain(self.norm(x + self.mlp(x)), "batch", "time", None)


class HRM(nnx.Module):
    """The model: one segment. `training.pondering` has what happens between segments."""

    def __init__(self, config: HRMConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        init = normal_cut_at_two(width**-0.5)

        def stack(layers: int) -> PostNormBlock:
            keys = jax.random.split(rngs.params(), layers)
            return jax.vmap(lambda key: PostNormBlock(config, rngs=nnx.Rngs(key)))(keys)

        def start() -> Fixed:
            return Fixed(normal_cut_at_two(1.0)(rngs.params(), (width,), jnp.float32), axes=(None,))

        self.embedding = Embedding(config.vocab_size, width, init=init, rngs=rngs)
        positions = (config.puzzle_tokens + config.length, width)
        self.position = (
            nnx.Param(init(rngs.params(), positions, jnp.float32), axes=(None, "embed"))
            if config.positions == "learned"
            else None
        )
        self.puzzle_vectors = (
            Table(jnp.zeros((config.puzzles, config.puzzle_width)), axes=("vocab", None))
            if config.puzzle_width
            else None
        )
        self.low, self.high = stack(config.low_layers), stack(config.high_layers)
        self.low_start, self.high_start = start(), start()
        self.head = Embedding(config.vocab_size, width, init=init, rngs=rngs)
        self.halt = Linear(
            width,
            2,
            init=jax.nn.initializers.zeros,
            axes=("embed", None),
            bias=True,
            bias_init=jax.nn.initializers.constant(-5.0),
            rngs=rngs,
        )

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The dtype of the weights, which states and activations follow."""
        return self.embedding.table[...].dtype

    def start(self, batch: int) -> Latent:
        """The states before a puzzle's first segment."""
        config = self.config
        shape = (batch, config.puzzle_tokens + config.length, config.width)

        def spread(vector: Fixed) -> Array:
            return jnp.broadcast_to(vector[...].astype(self.compute_dtype)[None, None], shape)

        return Latent(spread(self.high_start), spread(self.low_start))

    def init_carry(self, rows: Rows[Array]) -> Carry:
        """A carry whose rows have all halted, so that the first segment begins with new ones."""
        batch = rows.tokens.shape[0]
        return Carry(
            self.start(batch), jnp.zeros(batch, jnp.int32), jnp.ones(batch, jnp.bool_), rows
        )

    def vectors_of(self, puzzle: Array) -> Array | None:
        """The vectors (b puzzle_width) of puzzles (b); None if the model has none."""
        return None if self.puzzle_vectors is None else self.puzzle_vectors[...][puzzle]

    def __call__(
        self,
        tokens: Array,
        latent: Latent,
        vectors: Array | None = None,
        *,
        remat: RematPolicy = "none",
    ) -> tuple[Array, Array, Latent]:
        """Refines the answer for one segment.

        Args:
          tokens: int (b s), s the configured length.
          latent: the states before; no gradient reaches them.
          vectors: of the puzzles, from `vectors_of`.
          remat: what the gradient stores of the layers of a stack, see `ops.depth.remat_scan`.

        Returns:
          Logits (b s vocab), float32; (b 2) of q_halt and q_continue, float32; the states behind.

        Raises:
          ValueError: tokens have another length, or vectors another shape.
        """
        config = self.config
        x = self.embed(tokens, vectors)
        view, _ = attention.open_view(None, (x.shape[0], x.shape[1]))
        angles = self.low.attention.angles(view)

        def level(blocks: PostNormBlock, h: Array, injected: Array) -> Array:
            def body(h: Array, block: PostNormBlock) -> tuple[Array, None]:
                return block(h, view, angles), None

            return remat_scan(body, h + injected, blocks, remat=remat)[0]

        def fast(high: Array, low: Array) -> Array:
            with jax.named_scope("low"):
                return level(self.low, low, high + x)

        def slow(z: Latent) -> Latent:
            low, _ = iterate(
                functools.partial(fast, z.high),
                z.low,
                config.low_cycles,
                grad_steps=config.low_backprop,
            )
            with jax.named_scope("high"):
                high = level(self.high, z.high, low)
            notes.note("loop", (z.high, high))
            return Latent(high, low)

        start = jax.lax.stop_gradient(latent)
        latent, _ = iterate(slow, start, config.high_cycles, grad_steps=config.high_backprop)
        with jax.named_scope("head"):
            logits = self.head.logits(latent.high[:, config.puzzle_tokens :])
            q = self.halt(latent.high[:, 0]).astype(jnp.float32)
        return logits, q, latent

    def embed(self, tokens: Array, vectors: Array | None) -> Array:
        """x (b t d): the tokens of a puzzle behind those that its vector makes."""
        config = self.config
        batch, length = tokens.shape
        if length != config.length:
            raise ValueError(f"HRM: a puzzle has {config.length} tokens, got {length}.")
        wanted = (batch, config.puzzle_width) if config.puzzle_width else None
        got = None if vectors is None else vectors.shape
        if got != wanted:
            raise ValueError(f"HRM: the puzzles' vectors must be of shape {wanted}, got {got}.")
        with jax.named_scope("embed"):
            x = self.embedding(tokens)
            if vectors is not None:
                room = config.puzzle_tokens * config.width - config.puzzle_width
                front = jnp.pad(vectors.astype(x.dtype), [(0, 0), (0, room)])
                x = jnp.concatenate([front.reshape(batch, -1, config.width), x], axis=1)
            if self.position is not None:
                # The sum of two vectors of one scale, brought back to that scale.
                x = (x + self.position[...].astype(x.dtype)[None]) * jnp.asarray(0.5**0.5, x.dtype)
            return x * jnp.asarray(config.width**0.5, x.dtype)


SUDOKU_27M = HRMConfig(vocab_size=11, length=81, width=512, heads=8, puzzle_width=512, puzzles=1)
"""Sudoku-Extreme: 27,275,266 parameters beside the puzzles' vectors."""
MAZE_27M = dataclasses.replace(SUDOKU_27M, vocab_size=6, length=900)
"""Mazes of 30 x 30."""
SUDOKU_4X4 = HRMConfig(
    vocab_size=6,
    length=16,
    width=64,
    heads=4,
    high_layers=2,
    low_layers=2,
    max_segments=4,
    normaliser="softmax",
)
"""Sudoku of 4 x 4, for two CPU cores; its loss is by softmax, not by the published stablemax."""
MAZE_5X5 = dataclasses.replace(
    SUDOKU_4X4,
    length=25,
    positions="learned",
    high_layers=1,
    low_layers=1,
    low_cycles=1,
    high_backprop=2,
)
"""Mazes of 5 x 5, for two CPU cores. Positions are learned, with which it learns sooner than with
rotary ones: these say how far apart two tokens are in the row of all lines, not in the grid.
"""
