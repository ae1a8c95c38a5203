"""Huginn: a decoder whose middle is looped, so that depth is chosen when the model is used.

    e = prelude(sqrt(d) embed(tokens));   s^0 ~ N(0, 2/5);   s^{k+1} = core(W_a [s^k ; e]);
    logits = W_head norm(coda(norm(s^r)))

In training the number of loops r is drawn anew at every step and the gradient passes through the
last few only.

Geiping et al., Scaling up test-time compute with latent reasoning: a recurrent depth approach
(2025), arXiv:2502.05171.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxrec.config import above, at_least
from jaxrec.layers.attention import Attention
from jaxrec.layers.axes import constrain
from jaxrec.layers.embedding import Embedding
from jaxrec.layers.gathered import with_whole_weights
from jaxrec.layers.linear import Linear, truncated_normal
from jaxrec.layers.mlp import GatedMLP
from jaxrec.layers.norm import RMSNorm
from jaxrec.ops import attention, notes, rotary
from jaxrec.ops.depth import IterateInfo, RematPolicy, cache, iterate, remat_scan
from jaxrec.ops.depth.cache import DepthCache, Extend
from jaxrec.ops.depth.noise import LatentNoise
from jaxrec.ops.depth.remat import last_of

DEPTH_SIGMA = 0.5  # of the log-normal rate from which the number of loops is drawn


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuginnConfig:
    """Sizes and options; lengths in tokens, widths in channels."""

    vocab_size: int
    width: int
    heads: int  # width / heads must be even
    mlp_width: int  # inner width of the gated MLP
    prelude_layers: int
    core_layers: int
    coda_layers: int
    context: int
    mean_depth: int  # mean of the number of loops in training, minus one
    backprop_depth: int  # the gradient passes through at most so many loops
    rotary_base: float = 50000.0
    qk_bias: bool = True
    adapter_bias: bool = False
    tie_embeddings: bool = True
    norm_epsilon: float = 1e-6
    latent_scale: float = 1.0  # multiplies the deviation of the initial latent state

    def __post_init__(self) -> None:
        at_least(self, 1, "width", "heads")
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(
                f"HuginnConfig: width must be a multiple of heads with an even quotient,"
                f" got width {self.width} and heads {self.heads}."
            )
        at_least(self, 1, "vocab_size", "mlp_width", "core_layers", "context")
        at_least(self, 1, "mean_depth", "backprop_depth")
        at_least(self, 0, "prelude_layers", "coda_layers", "norm_epsilon", "latent_scale")
        above(self, 0, "rotary_base")

    @property
    def weight_std(self) -> float:
        """Deviation of input projections and of the latent state, sqrt(2/5d) ("takase"
        initialisation).
        """
        return (2 / (5 * self.width)) ** 0.5

    @property
    def output_std(self) -> float:
        """Deviation of what writes to the residual stream: shrunk by the mean number of executed
        blocks.
        """
        executed = self.prelude_layers + self.coda_layers + self.core_layers * self.mean_depth
        return self.weight_std / (2 * executed) ** 0.5

    def build(self, *, rngs: nnx.Rngs) -> "Huginn":
        """A freshly initialised model."""
        return Huginn(self, rngs=rngs)

    def sample_depth(self, rng: np.random.Generator) -> int:
        """Draws Poisson(rate) + 1 loops with log(rate) ~ N(log(mean_depth) - sigma^2/2,
        sigma^2).
        """
        rate = rng.lognormal(np.log(self.mean_depth) - DEPTH_SIGMA**2 / 2, DEPTH_SIGMA)
        return int(rng.poisson(rate)) + 1

    def flops_per_token(
        self, time: int, depth: int | None = None, *, training: bool = False
    ) -> float:
        """Multiplications and additions of all matrix products, causal attention counted as half a
        square.

        With `training`, plus twice those of the parts that the truncated gradient passes through.
        """
        depth = self.mean_depth if depth is None else depth
        block = 2 * (4 * self.width**2 + 3 * self.width * self.mlp_width) + 2 * self.width * time
        loop = self.core_layers * block + 2 * self.width**2
        ends = (self.prelude_layers + self.coda_layers) * block
        ends += 2 * self.width**2 + 2 * self.width * self.vocab_size
        graded = ends + min(depth, self.backprop_depth) * loop if training else 0
        return ends + depth * loop + 2 * graded


class SandwichBlock(nnx.Module):
    """Attention and MLP, each normalised before and, with its residual, after: the stream has unit
    scale.
    """

    def __init__(self, config: HuginnConfig, *, rngs: nnx.Rngs):
        init, out_init = truncated_normal(config.weight_std), truncated_normal(config.output_std)

        def norm() -> RMSNorm:
            return RMSNorm(config.width, epsilon=config.norm_epsilon)

        self.attention_norm, self.attention_out_norm = norm(), norm()
        self.attention = Attention(
            config.width,
            config.heads,
            qk_bias=config.qk_bias,
            rotary_base=config.rotary_base,
            rotary_pairing="interleaved",
            init=init,
            out_init=out_init,
            rngs=rngs,
        )
        self.mlp_norm, self.mlp_out_norm = norm(), norm()
        self.mlp = GatedMLP(
            config.width,
            config.mlp_width,
            init=init,
            up_init=out_init,
            out_init=out_init,
            rngs=rngs,
        )

    def __call__(self, x: Array, cache: Any, **view: Any) -> tuple[Array, Any]:
        """Maps x (b t d) to (b t d); the keyword arguments are those of `Attention`."""
        y, cache = self.attention(self.attention_norm(x), cache, **view)
        x = self.attention_out_norm(y + x)
        x = self.mlp_out_norm(self.mlp(self.mlp_norm(x)) + x)
        return constrain(x, "batch", "time", None), cache


def _stack(config: HuginnConfig, layers: int, rngs: nnx.Rngs) -> SandwichBlock | None:
    """`layers` blocks as one, each parameter with a leading axis l; None for none."""
    if layers == 0:
        return None
    keys = jax.random.split(rngs.params(), layers)
    return jax.vmap(lambda key: SandwichBlock(config, rngs=nnx.Rngs(key)))(keys)


class Latent(NamedTuple):
    """The state of the loop over the core."""

    state: Array  # s (b t d), float32
    cache: DepthCache | None
    loop: Array  # int32 (): loops done


class Huginn(nnx.Module):
    """The model. State is a `DepthCache` with slots for executed blocks, or None."""

    def __init__(self, config: HuginnConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = truncated_normal(config.weight_std)
        self.embedding = Embedding(config.vocab_size, config.width, init=init, rngs=rngs)
        self.prelude = _stack(config, config.prelude_layers, rngs)
        # The adapter's matrix for [s ; e], cut in two: what it makes of e is the same in every
        # loop.
        axes = (None, "embed")
        self.adapter_latent = Linear(
            config.width, config.width, init=init, axes=axes, bias=config.adapter_bias, rngs=rngs
        )
        self.adapter_input = Linear(config.width, config.width, init=init, axes=axes, rngs=rngs)
        self.core = _stack(config, config.core_layers, rngs)
        self.coda = _stack(config, config.coda_layers, rngs)
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        self.head = (
            None
            if config.tie_embeddings
            else Embedding(config.vocab_size, config.width, init=init, rngs=rngs)
        )

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The dtype of the weights, which activations follow; the latent state stays float32."""
        return self.embedding.table[...].dtype

    def init_state(
        self, batch: int, *, capacity: int, depth: int | None = None, strategy: str = "full"
    ) -> DepthCache:
        """An empty cache for `capacity` tokens at up to `depth` loops (the trained mean if None);
        which slots it has is said by a strategy of `ops.depth.cache`.
        """
        config = self.config
        depth = config.mean_depth if depth is None else depth
        layout = cache.Layout.of(
            strategy, config.prelude_layers, config.core_layers, config.coda_layers
        )
        head_width = config.width // config.heads
        return cache.init_cache(
            layout, depth, batch, capacity, config.heads, head_width, self.compute_dtype
        )

    def init_latent(self, key: Array | None, batch: int, time: int) -> Array:
        """s^0 (b t d) float32: normal with deviation latent_scale * sqrt(2/5), cut at three; zero
        without a key.
        """
        shape = (batch, time, self.config.width)
        if key is None:
            return jnp.zeros(shape)
        stddev = self.config.latent_scale * self.config.weight_std * self.config.width**0.5
        return truncated_normal(stddev)(key, shape, jnp.float32)

    def __call__(
        self,
        tokens: Array,
        state: DepthCache | None = None,
        *,
        segment_ids: Array | None = None,
        depth: int | Array | None = None,
        key: Array | None = None,
        latent: Array | None = None,
        grad_steps: int | None = None,
        remat: RematPolicy = "none",
    ) -> tuple[Array, DepthCache | None]:
        """Scores the next token at every position.

        Args:
          tokens: int (b t).
          state: cache of the tokens so far, from `init_state`; None keeps nothing. More tokens than
            its capacity, or more loops than its depth, overwrite its end without a word.
          segment_ids: int (b t), documents packed in a row; see `ops.attention.open_view`.
          depth: number of loops, int or traced int32; the trained mean if None. Without a state any
            number.
          key: draws the initial latent state; None begins at zero.
          latent: the initial latent state itself, (b t d) float32, instead of a key.
          grad_steps: loops that the gradient passes through; None: config.backprop_depth without a
            state, and no gradient at all with one.
          remat: what the gradient stores, see `ops.depth.remat_scan`.

        Returns:
          Logits (b t vocab), float32, and the cache.
        """
        batch, time = tokens.shape
        depth = self.config.mean_depth if depth is None else depth
        view, state = cache.open_view(state, (batch, time), segment_ids)
        embedded, state = self.embed(tokens, view, state, remat=remat)
        if latent is None:
            latent = self.init_latent(key, batch, time)
        latent, state, _ = self.refine(
            latent, embedded, depth, view, state, grad_steps=grad_steps, remat=remat
        )
        return self.predict(latent, view, state, remat=remat)

    def embed(
        self,
        tokens: Array,
        view: attention.View,
        state: DepthCache | None = None,
        *,
        remat: RematPolicy = "none",
    ) -> tuple[Array, DepthCache | None]:
        """Tokens (b t) through embedding and prelude: e (b t d), the input of every loop."""
        with jax.named_scope("prelude"):
            x = self.embedding(tokens) * jnp.asarray(self.config.width**0.5, self.compute_dtype)
            x = constrain(x, "batch", "time", None)
            return self._run(self.prelude, x, view, state, 0, remat)

    def inject(self, embedded: Array) -> Array:
        """What the adapter makes of e (b t d); the same in every loop."""
        return self.adapter_input(embedded)

    def loop(
        self,
        z: Latent,
        injected: Array,
        view: attention.View,
        *,
        keep: Array | None = None,
        noise: LatentNoise | None = None,
        noise_keys: Array | None = None,
        remat: RematPolicy = "none",
    ) -> Latent:
        """Runs the core once.

        Args:
          z: the latent state, the cache and the number of loops done.
          injected: of `inject`, (b t d).
          view: the opened timeline.
          keep: bool (b), rows that store their keys and values; None: all.
          noise: put on the latent state before the loop; None: nothing.
          noise_keys: (b t) PRNG keys of each token, the same in all loops.
          remat: what the gradient stores, see `ops.depth.remat_scan`.
        """
        if noise is not None:
            z = z._replace(state=self._disturb(z.state, z.loop, noise, noise_keys))
        weights = (self.core, self.adapter_latent)
        return self._loop_by(weights, z, injected, view, remat, keep)

    def _loop_by(
        self,
        weights: tuple[SandwichBlock | None, Linear],
        z: Latent,
        injected: Array,
        view: attention.View,
        remat: RematPolicy,
        keep: Array | None = None,
    ) -> Latent:
        """Runs a core with an adapter once."""
        core, adapter = weights
        x = adapter(z.state) + injected
        extend = None if z.cache is None else cache.core_extend(z.cache, keep)
        execution = z.loop * self.config.core_layers
        x, state = self._run(core, x, view, z.cache, execution, remat, extend)
        after = x.astype(jnp.float32)
        notes.note("loop", (z.state, after))
        return Latent(after, state, z.loop + 1)

    def _disturb(self, latent: Array, loop: Array, noise: LatentNoise, keys: Array | None) -> Array:
        """The latent state (b t d) with noise, normed as the core's last block norms its sum."""
        assert self.core is not None and keys is not None, "noise needs a key for every token"
        deviation = self.config.weight_std * self.config.width**0.5

        def mix(latent: Array, key: Array) -> Array:
            key = jax.random.fold_in(key, loop)
            return noise.mix(latent, loop, key, deviation, self.config.mean_depth)

        return last_of(self.core).mlp_out_norm(jax.vmap(jax.vmap(mix))(latent, keys))

    def refine(
        self,
        latent: Array,
        embedded: Array,
        depth: int | Array,
        view: attention.View,
        state: DepthCache | None = None,
        *,
        grad_steps: int | None = None,
        remat: RematPolicy = "none",
    ) -> tuple[Array, DepthCache | None, IterateInfo]:
        """Loops the core from the latent state s (b t d); returns s^depth, cache and info."""
        # One recomputation is enough: "sqrt" is left to the loop over the blocks, the rest to them.
        per_block: RematPolicy = "none" if remat == "sqrt" else remat
        per_loop: RematPolicy = "sqrt" if remat == "sqrt" else "none"
        if grad_steps is None and state is None:
            grad_steps = self.config.backprop_depth
        is_fixed = isinstance(depth, int)

        def run(weights: Any, rows: Any, shared: Any) -> tuple[Array, Any]:
            (first, injected, positions, mask), (place, traced) = rows, shared
            seen = attention.View(positions, mask, place)
            end, info = iterate(
                lambda z: self._loop_by(weights, z, injected, seen, per_block),
                Latent(first, state, jnp.zeros((), jnp.int32)),
                depth if is_fixed else traced,
                grad_steps=grad_steps,
                remat=per_loop,
            )
            return end.state, (end.cache, end.loop, info)

        with jax.named_scope("core"):
            weights = (self.core, self.adapter_latent)
            rows = (latent, self.inject(embedded), view.positions, view.mask)
            shared = (view.start, None if is_fixed else depth)
            if state is not None:  # of writing, where nothing is trained
                latent, (kept, loop, info) = run(weights, rows, shared)
            else:
                latent, (kept, loop, info) = with_whole_weights(run, weights, rows, shared)
        state = kept if kept is None else cache.set_loops(kept, view, loop)
        return latent, state, info

    def predict(
        self,
        latent: Array,
        view: attention.View,
        state: DepthCache | None = None,
        *,
        remat: RematPolicy = "none",
    ) -> tuple[Array, DepthCache | None]:
        """Latent state s (b t d) through norm, coda, norm and head: logits (b t vocab), float32."""
        with jax.named_scope("coda"):
            x = self.norm(latent).astype(self.compute_dtype)
            slot = 0 if state is None else state.coda_slot
            x, state = self._run(self.coda, x, view, state, slot, remat)
            head = self.embedding if self.head is None else self.head
            logits = head.logits(self.norm(x))
        return logits, state

    def _run(
        self,
        blocks: SandwichBlock | None,
        x: Array,
        view: attention.View,
        state: DepthCache | None,
        slot: Array | int,
        remat: RematPolicy,
        extend: Extend | None = None,
    ) -> tuple[Array, DepthCache | None]:
        """Runs stacked blocks one after another, using slots (or executions) from `slot` on."""
        if blocks is None:
            return x, state
        angles = rotary.rotation(
            view.positions, self.config.width // self.config.heads, self.config.rotary_base
        )

        def body(carry: tuple[Array, Any, Array], block: SandwichBlock) -> tuple[Any, None]:
            x, kv, slot = carry
            x, kv = block(x, kv, view=view, angles=angles, slot=slot, extend=extend)
            return (x, kv, slot + 1), None

        kv = None if state is None else state.kv
        start = (x, kv, jnp.asarray(slot, jnp.int32))
        (x, kv, _), _ = remat_scan(body, start, blocks, remat=remat)
        return x, state if state is None else dataclasses.replace(state, kv=kv)


TINY = HuginnConfig(
    vocab_size=272,
    width=128,
    heads=4,
    mlp_width=384,
    prelude_layers=1,
    core_layers=2,
    coda_layers=1,
    context=1024,
    mean_depth=4,
    backprop_depth=3,
    qk_bias=False,
)
"""Bytes; learns real text in minutes on two CPU cores."""

SMALL = HuginnConfig(
    vocab_size=32768,
    width=768,
    heads=12,
    mlp_width=2560,
    prelude_layers=2,
    core_layers=4,
    coda_layers=2,
    context=2048,
    mean_depth=16,
    backprop_depth=8,
)
"""About 90 million parameters; for one accelerator."""

HUGINN_3_5B = HuginnConfig(
    vocab_size=65536,
    width=5280,
    heads=55,
    mlp_width=17920,
    prelude_layers=2,
    core_layers=4,
    coda_layers=2,
    context=4096,
    mean_depth=32,
    backprop_depth=8,
)
"""The published nebel-raven-3.5b: 3,564,976,800 parameters, of which the published number,
3,509,051,040, leaves out those of the adapter and of the blocks' norms."""
