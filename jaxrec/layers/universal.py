"""A stack of transformer layers whose middle is looped: encoder or decoder of a Universal
Transformer.

    x <- layers_before(x + P);   in loop t = 0 .. T-1:  x <- block(coordinates(x, t));
    y = norm(layers_after(x))

The block is one layer or a few. With halting every position (or row) chooses its number of loops,
T at most, and x after the loops is what `ops.depth.halting` makes of the states.

    pre     a = x + mha(norm(x));  b = a + cross(norm(a));  y = b + transition(norm(b))
    post    a = norm(x + mha(x));  b = norm(a + cross(a));  y = norm(b + transition(b))

`pre` is the original's code, `post`, without the last norm of the stack, the paper's text.

Dehghani et al., Universal transformers (2018), arXiv:1807.03819, section 2.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxrec.config import at_least, multiple_of, one_of
from jaxrec.layers.attention import Attention, CrossAttention
from jaxrec.layers.axes import constrain
from jaxrec.layers.coordinates import Coordinates, Join, Start, StepCoordinates
from jaxrec.layers.dropout import dropout
from jaxrec.layers.linear import Linear, uniform
from jaxrec.layers.mlp import MLP
from jaxrec.layers.norm import LayerNorm
from jaxrec.layers.separable_conv import SeparableConv, Windows
from jaxrec.ops import attention, notes
from jaxrec.ops.depth import RematPolicy, remat_scan
from jaxrec.ops.depth.halting import Rule, adaptive_loop, global_probability

Transition = Literal["mlp", "conv"]
Order = Literal["pre", "post"]
Halts = Literal["none", "position", "row"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Sizes and options; widths in channels."""

    width: int
    heads: int
    mlp_width: int  # inner width of the transition
    steps: int  # loops; with halting, the most of them
    block_layers: int = 1  # different layers that a loop runs
    layers_before: int = 0  # not looped
    layers_after: int = 0
    transition: Transition = "mlp"  # an MLP, or separable convolutions over 3 and 5 steps
    step_coordinates: StepCoordinates = "learned"
    join: Join = "add"  # how coordinates enter
    start: Start = "zero"  # first position: 0, drawn in training, or t/T of the length in loop t
    order: Order = "pre"
    halting: Halts = "none"  # adaptive depth for each position, or for each row of an encoder
    rule: Rule = "interpolate"  # how the states of an adaptive loop are combined
    halting_epsilon: float = 0.01
    halting_bias: float = 1.0  # initial; of the logit of halting
    ponder_weight: float = 0.01  # of the ponder loss
    dropout: float = 0.0  # of embeddings and of what every sublayer adds, in training
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        at_least(self, 1, "mlp_width", "steps", "block_layers")
        at_least(self, 2, "width")
        at_least(self, 0, "layers_before", "layers_after", "ponder_weight", "dropout")
        multiple_of(self, "heads", "width")
        options = {
            "transition": Transition,
            "step_coordinates": StepCoordinates,
            "join": Join,
            "start": Start,
            "order": Order,
            "halting": Halts,
            "rule": Rule,
        }
        for field, known in options.items():
            one_of(self, field, get_args(known))
        if not 0 < self.halting_epsilon < 1 or self.dropout >= 1:
            raise ValueError(
                f"{type(self).__name__}: halting_epsilon must lie in (0, 1) and dropout in [0, 1),"
                f" got {self.halting_epsilon} and {self.dropout}."
            )

    @property
    def layers_run(self) -> int:
        """Layers that a token passes, of which each has a slot in a cache."""
        return self.layers_before + self.steps * self.block_layers + self.layers_after


class Memory(NamedTuple):
    """What executed layers keep of the tokens so far, by slot, one for each execution."""

    kv: attention.KVCache
    windows: Windows | None  # (l b w-1 ...), of convolutions


class Ponder(NamedTuple):
    """How long positions pondered, (b t) float32."""

    time: Array  # loops that counted plus the remainder; its gradient is that of the remainder
    steps: Array  # loops that counted


class Source(NamedTuple):
    """What a decoder attends to: keys and values (l b s h k) of its layers, by their place."""

    before: Any
    core: Any
    after: Any
    is_token: Array  # bool (b s)


class _Shared(NamedTuple):
    """What all layers of one call see."""

    view: attention.View
    reset: Array | None  # bool (b t), of convolutions
    is_token: Array | None  # bool (b t), of an encoder
    source_is_token: Array | None
    key: Array | None  # of dropout


class UniversalLayer(nnx.Module):
    """Attention, attention to a source, and a transition, each with its residual."""

    def __init__(self, config: StackConfig, *, causal: bool, cross: bool, rngs: nnx.Rngs):
        width, inner = config.width, config.mlp_width
        square, oblong = (uniform((6 / (width + size)) ** 0.5) for size in (width, inner))

        def norm() -> LayerNorm:
            return LayerNorm(width, epsilon=config.norm_epsilon)

        self.attention_norm = norm()
        self.attention = Attention(
            width, config.heads, rotary_base=None, causal=causal, init=square, rngs=rngs
        )
        self.cross_norm = norm() if cross else None
        self.cross = CrossAttention(width, config.heads, init=square, rngs=rngs) if cross else None
        self.transition_norm = norm()
        self.transition: MLP | SeparableConv = (
            MLP(width, inner, init=oblong, activation=jax.nn.relu, rngs=rngs)
            if config.transition == "mlp"
            else SeparableConv(width, inner, causal=causal, init=oblong, rngs=rngs)
        )
        self.is_pre, self.dropout = config.order == "pre", config.dropout

    def __call__(
        self, x: Array, memory: Memory | None, slot: Array, source: Any, shared: _Shared
    ) -> tuple[Array, Memory | None]:
        """Maps x (b t d) to (b t d), with its slot of the memory."""
        keys: Any = (None, None, None)
        if shared.key is not None and self.dropout:
            keys = jax.random.split(jax.random.fold_in(shared.key, slot), 3)
        kv = None if memory is None else memory.kv
        y, kv = self.attention(self._read(self.attention_norm, x), kv, view=shared.view, slot=slot)
        x = self._add(self.attention_norm, x, y, keys[0])
        if self.cross is not None and self.cross_norm is not None:
            assert shared.source_is_token is not None, "a source has a mask"
            y = self.cross(self._read(self.cross_norm, x), source, shared.source_is_token)
            x = self._add(self.cross_norm, x, y, keys[1])
        inner = self._read(self.transition_norm, x)
        windows = None if memory is None else memory.windows
        if isinstance(self.transition, SeparableConv):
            before = None
            if windows is not None:
                before = jax.tree.map(
                    lambda w: lax.dynamic_index_in_dim(w, slot, keepdims=False), windows
                )
            y, last = self.transition(inner, before, reset=shared.reset, is_token=shared.is_token)
            if windows is not None:
                windows = jax.tree.map(
                    lambda w, new: lax.dynamic_update_index_in_dim(w, new, slot, 0), windows, last
                )
        else:
            y = self.transition(inner)
        x = constrain(self._add(self.transition_norm, x, y, keys[2]), "batch", "time", None)
        return x, memory if kv is None else Memory(kv, windows)

    def remember(self, x: Array, memory: Memory, slot: Array, view: attention.View) -> Memory:
        """Keeps the keys and values of x (b t d), and computes nothing else."""
        kv = self.attention.key_value(self._read(self.attention_norm, x))
        return memory._replace(
            kv=attention.write(memory.kv, slot, kv[:, :, 0], kv[:, :, 1], view.start)
        )

    def _read(self, norm: LayerNorm, x: Array) -> Array:
        return norm(x) if self.is_pre else x

    def _add(self, norm: LayerNorm, x: Array, y: Array, key: Array | None) -> Array:
        y = x + dropout(y, self.dropout, key).astype(x.dtype)
        return y if self.is_pre else norm(y)


class UniversalStack(nnx.Module):
    """An encoder, or a decoder with a source or without."""

    def __init__(self, config: StackConfig, *, causal: bool, cross: bool = False, rngs: nnx.Rngs):
        if causal and config.halting == "row":
            raise ValueError(
                f"{type(config).__name__}: halting by row averages over all positions, which a"
                " decoder must not see. Expected halting 'none' or 'position'."
            )

        def layers(count: int) -> UniversalLayer | None:
            def layer(key: Array) -> UniversalLayer:
                return UniversalLayer(config, causal=causal, cross=cross, rngs=nnx.Rngs(key))

            return jax.vmap(layer)(jax.random.split(rngs.params(), count)) if count else None

        self.config, self.causal = config, causal
        self.coordinates = Coordinates(
            config.width,
            config.steps,
            step=config.step_coordinates,
            join=config.join,
            start=config.start,
            rngs=rngs,
        )
        self.before = layers(config.layers_before)
        self.core = layers(config.block_layers)
        self.after = layers(config.layers_after)
        self.norm = (
            LayerNorm(config.width, epsilon=config.norm_epsilon) if config.order == "pre" else None
        )
        self.halt = (
            Linear(
                config.width,
                1,
                init=uniform((6 / (config.width + 1)) ** 0.5),
                axes=("embed", None),
                bias=True,
                bias_init=jax.nn.initializers.constant(config.halting_bias),
                rngs=rngs,
            )
            if config.halting != "none"
            else None
        )

    def init_state(self, batch: int, *, capacity: int) -> Memory:
        """An empty memory of a decoder for `capacity` tokens."""
        slots = self.config.layers_run
        layer = jax.tree.map(lambda leaf: leaf[0], self.core)
        windows = None
        if isinstance(layer.transition, SeparableConv):
            windows = jax.tree.map(
                lambda w: jnp.broadcast_to(w[None], (slots, *w.shape)),
                layer.transition.init_state(batch),
            )
        kv = layer.attention.init_state(batch, capacity=capacity, slots=slots)
        return Memory(kv, windows)

    def read(self, source: Array, is_token: Array) -> Source:
        """What every layer of a decoder makes of a source (b s d); the same in all loops."""

        def of(layers: UniversalLayer | None) -> Any:
            if layers is None:
                return None
            return jax.vmap(lambda layer: layer.cross.read(source))(layers)

        return Source(of(self.before), of(self.core), of(self.after), is_token)

    def __call__(
        self,
        x: Array,
        memory: Memory | None = None,
        *,
        segment_ids: Array | None = None,
        is_token: Array | None = None,
        source: Source | None = None,
        offset: Array | None = None,
        length: int | None = None,
        differentiable: bool = True,
        key: Array | None = None,
        remat: RematPolicy = "none",
    ) -> tuple[Array, Memory | None, Ponder | None]:
        """Maps embedded tokens to what a head reads.

        Args:
          x: (b t d).
          memory: of a decoder, from `init_state`; None keeps nothing.
          segment_ids: of a decoder, int (b t), see `ops.attention.open_view`.
          is_token: of an encoder, bool (b t), False for padding, which nobody sees; None: all are.
          source: of a decoder that has one.
          offset: int32 (b), added to positions; None: nothing.
          length: by which the start "step" shifts; None: t.
          differentiable: False: an adaptive loop ends as soon as it may, without reverse
            derivative.
          key: of dropout; None drops nothing.
          remat: what the gradient stores, see `ops.depth.remat_scan`.

        Returns:
          (b t d), the memory, and with halting how long each position pondered.
        """
        config, (batch, time) = self.config, x.shape[:2]
        view, memory, reset = self._open(memory, (batch, time), segment_ids, is_token)
        shared = _Shared(view, reset, is_token, None if source is None else source.is_token, key)
        position = view.positions
        if offset is not None:
            position = position + offset[:, None]
        fixed = self.coordinates.positions(position, x)
        none: RematPolicy = "none"
        per_loop, per_layer = (none, remat) if config.steps == 1 else (remat, none)

        def run(
            layers: UniversalLayer | None, x: Array, memory: Any, slot: Any, kept: Any, remat: Any
        ) -> tuple[Array, Any]:
            """Layers one after another, using slots from `slot` on."""
            if layers is None:
                return x, memory

            def body(carry: Any, layer: Any) -> tuple[Any, None]:
                x, memory, slot = carry
                x, memory = layer[0](x, memory, slot, layer[1], shared)
                return (x, memory, slot + 1), None

            start = (x, memory, jnp.asarray(slot, jnp.int32))
            (x, memory, _), _ = remat_scan(body, start, (layers, kept), remat=remat)
            return x, memory

        def prepare(x: Array, t: Array) -> Array:
            return self.coordinates(x, position, fixed, t, time if length is None else length)

        def step(x: Array, t: Array, memory: Any) -> tuple[Array, Any]:
            slot = config.layers_before + t * config.block_layers
            with jax.named_scope("loop"):
                return run(self.core, x, memory, slot, sources.core, per_layer)

        sources = Source(None, None, None, jnp.ones((), jnp.bool_)) if source is None else source
        if self.before is not None:
            x, memory = run(self.before, x + fixed, memory, 0, sources.before, remat)
        ponder = None
        if self.halt is None:

            def body(carry: Any, t: Array) -> tuple[Any, None]:
                x, memory = carry
                new, memory = step(prepare(x, t), t, memory)
                notes.note("loop", (x, new))
                return (new, memory), None

            loops = jnp.arange(config.steps, dtype=jnp.int32)
            (x, memory), _ = remat_scan(body, (x, memory), loops, remat=per_loop)
        else:
            ends_early = not differentiable and (memory is None or self.can_leave_out)
            end = adaptive_loop(
                step,
                lambda x: self._probability(x, is_token),
                prepare,
                x,
                config.steps,
                memory=memory,
                rule=config.rule,
                epsilon=config.halting_epsilon,
                differentiable=not ends_early,
                remat=per_loop,
            )
            x, memory = end.halting.output, end.memory
            ponder = Ponder(end.ponder, end.halting.updates)
            if memory is not None and ends_early:
                memory = self._fill(end.state, memory, end.loops, prepare, view)
        slot = config.layers_before + config.steps * config.block_layers
        x, memory = run(self.after, x, memory, slot, sources.after, remat)
        return x if self.norm is None else self.norm(x), memory, ponder

    @property
    def can_leave_out(self) -> bool:
        """Loops in which no position runs may be left out even with a memory: what they would keep
        follows from the last state alone.
        """
        config = self.config
        return (config.rule, config.block_layers, config.transition) == ("copy-halted", 1, "mlp")

    def _open(
        self,
        memory: Memory | None,
        shape: tuple[int, int],
        segment_ids: Array | None,
        is_token: Array | None,
    ) -> tuple[attention.View, Memory | None, Array | None]:
        """What tokens see, the memory with their timeline, and where segments begin."""
        if not self.causal:
            view, _ = attention.open_view(None, shape)
            if is_token is not None:
                mask = jnp.broadcast_to(is_token[:, None], (*shape, shape[1]))
                view = view._replace(mask=mask)
            return view, None, None
        view, kv = attention.open_view(None if memory is None else memory.kv, shape, segment_ids)
        if memory is not None and kv is not None:
            memory = memory._replace(kv=kv)
        return view, memory, view.positions == 0

    def _probability(self, x: Array, is_token: Array | None) -> Array:
        assert self.halt is not None, "only with halting"
        p = jax.nn.sigmoid(self.halt(x).astype(jnp.float32)[..., 0])
        return global_probability(p, is_token) if self.config.halting == "row" else p

    def _fill(
        self, state: Array, memory: Memory, begin: Array, prepare: Any, view: attention.View
    ) -> Memory:
        """Keeps what the loops from `begin` on would: every state stays, its coordinates do not."""
        layer = jax.tree.map(lambda leaf: leaf[0], self.core)

        def body(t: Array, memory: Memory) -> Memory:
            slot = self.config.layers_before + t
            return layer.remember(prepare(state, t), memory, slot, view)

        return lax.fori_loop(begin, self.config.steps, body, memory)
