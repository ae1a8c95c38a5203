"""pLSTM layers on sequences and on grids.

    y = W_out norm(STM(q, k, v; S, T, M, D)) + g x

with gates and q, k, v from x, or, where `conv_inputs` says so, from a short causal depthwise
convolution of it; the norm is that of each head.

On a grid every one of four orientations has gates of its own. Mode P splits what enters a node
between its two ways out, by an angle a of each orientation and head,

    S_r = a S,   S_d = 1 - S_r,   T_rl = T_ru = a T,   T_dl = T_du = 1 - a T,   M_l = M_u,

so that it travels in a direction; mode D has gates for both ways but lets the state turn only from
one into the other, so that between two nodes there is a single path and it spreads.

Pöppel et al., pLSTM: parallelizable linear source transition mark networks (2025),
arXiv:2506.11997, section 4.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxrec.config import at_least, one_of
from jaxrec.layers.linear import Linear, uniform
from jaxrec.layers.norm import LayerNorm, RMSNorm
from jaxrec.layers.plstm_gates import (
    Gate,
    GateConfig,
    HeadMap,
    Projection,
    ProjectionConfig,
    Transition,
    TransitionConfig,
    TransitionLayerConfig,
    small_init,
)
from jaxrec.ops import notes
from jaxrec.ops.conv import causal_conv, causal_conv_2d
from jaxrec.ops.time import GridGates, grid_scan, mark_scan

Norm = Literal["rms", "layer"]
Mode = Literal["P", "D"]
Chirality = Literal["L", "R"]
Flips = Literal["corrected", "original"]


_GATE, _DIRECT = GateConfig(), GateConfig(bias_init=-6.0)
_TRANSITION, _PROJECTION = TransitionConfig(), ProjectionConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LayerConfig:
    """What layers on sequences and on grids share. Of each head and of all heads together
    `heads * value_width * jo` must be the width.
    """

    width: int
    heads: int
    key_width: int
    value_width: int
    jk: int = 1  # keys of each head, read together
    jq: int = 1  # queries
    jv: int = 1  # values
    jt: int = 1  # states, which the transition mixes
    jo: int = 1  # outputs
    source: GateConfig = _GATE
    transition: TransitionConfig = _TRANSITION
    mark: GateConfig = _GATE
    direct: GateConfig = _DIRECT
    query: ProjectionConfig = _PROJECTION
    key: ProjectionConfig = _PROJECTION
    value: ProjectionConfig = _PROJECTION
    tie_query_key: bool = False
    # Which of S T M D Q K V, O (the angle) and, on sequences, P (the skip) read the convolution.
    conv_inputs: str = "STMDQKO"
    conv_bias: bool = True
    norm: Norm = "rms"
    norm_bias: bool = False
    norm_epsilon: float = 1e-5
    out: bool = True  # has an output projection
    out_bias: bool = False
    skip: bool = False  # has a gain g for each channel

    def __post_init__(self) -> None:
        at_least(self, 1, "width", "heads", "key_width", "value_width")
        at_least(self, 1, "jk", "jq", "jv", "jt", "jo")
        one_of(self, "norm", get_args(Norm))
        made = self.heads * self.value_width * self.jo
        if made != self.width:
            raise ValueError(
                f"{type(self).__name__}: heads * value_width * jo must be the width {self.width},"
                f" got {self.heads} * {self.value_width} * {self.jo} = {made}."
            )
        if self.tie_query_key and self.jk != self.jq:
            raise ValueError(
                f"{type(self).__name__}: tie_query_key needs jk = jq, got {self.jk} and {self.jq}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PLSTMConfig(_LayerConfig):
    """A layer on sequences."""

    jv: int = 4
    jt: int = 4
    jo: int = 4
    conv_width: int | None = 4  # taps; None: no convolution
    conv_inputs: str = "STMDQKP"
    skip: bool = True
    chunk: int = 32  # steps that are worked on together
    # The original's gradient does not leave chunks of so many steps of a call, although the state
    # does. None: the exact gradient.
    gradient_chunk: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "chunk")
        if self.gradient_chunk is not None:
            at_least(self, 1, "gradient_chunk")
        if self.conv_width is not None:
            at_least(self, 2, "conv_width")

    def build(self, *, rngs: nnx.Rngs) -> "PLSTM":
        """A freshly initialised layer."""
        return PLSTM(self, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PLSTMGridConfig(_LayerConfig):
    """A layer on grids."""

    mode: Mode = "P"
    chirality: Chirality = "L"  # mode D: which turn there is, L from y to x, R from x to y
    angle_scale: float = 0.5  # mode P: of what the angle reads
    # Outputs of all orientations are added and then normalised, else normalised each and averaged.
    fused: bool = True
    orientations: tuple[int, ...] = (0, 1, 2, 3)  # as in `ops.time.grid_scan`
    # The original's layer that is not fused turns y by the third bit of an orientation, which of
    # 0 to 3 none has, instead of the second; "original" does that too.
    flips: Flips = "corrected"
    conv_width: tuple[int, int] | None = None  # taps along x and y; None: no convolution

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "mode", get_args(Mode))
        one_of(self, "chirality", get_args(Chirality))
        one_of(self, "flips", get_args(Flips))
        if self.conv_width is not None and min(self.conv_width) < 2:
            raise ValueError(
                f"PLSTMGridConfig: conv_width must be >= 2 along x and y, got {self.conv_width}."
            )
        largest = 3 if self.flips == "corrected" else 7
        if not self.orientations or not all(0 <= o <= largest for o in self.orientations):
            raise ValueError(
                f"PLSTMGridConfig: orientations must lie in 0 to {largest}, got"
                f" {self.orientations}."
            )
        if self.fused and (self.orientations != (0, 1, 2, 3) or self.flips == "original"):
            raise ValueError(
                "PLSTMGridConfig: a fused layer has the orientations (0, 1, 2, 3) and corrected"
                f" flips, got {self.orientations} and {self.flips}."
            )

    @property
    def directions(self) -> tuple[int, ...]:
        """The orientations as `ops.time.grid_scan` counts them."""
        if self.flips == "corrected":
            return self.orientations
        return tuple((o & 1) | (o >> 2 & 1) << 1 for o in self.orientations)

    def build(self, *, rngs: nnx.Rngs) -> "PLSTMGrid":
        """A freshly initialised layer."""
        return PLSTMGrid(self, rngs=rngs)


class _Shared(nnx.Module):
    """Queries, keys, values, the direct gate, and what follows the recurrence."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        width, heads = config.width, config.heads
        self.query = Projection(config.query, width, heads, config.key_width, config.jq, rngs=rngs)
        self.key = (
            None
            if config.tie_query_key
            else Projection(config.key, width, heads, config.key_width, config.jk, rngs=rngs)
        )
        self.value = Projection(
            config.value, width, heads, config.value_width, config.jv, rngs=rngs
        )
        sizes = (config.jo, config.jq, config.jk, config.jv)
        self.direct = Gate(config.direct, width, heads, sizes, rngs=rngs)
        norm = RMSNorm if config.norm == "rms" else LayerNorm
        self.norm = norm(width, epsilon=config.norm_epsilon, groups=heads, bias=config.norm_bias)
        self.out = (
            Linear(
                width,
                width,
                init=small_init(width),
                axes=("mlp", "embed"),
                bias=config.out_bias,
                rngs=rngs,
            )
            if config.out
            else None
        )
        self.skip = nnx.Param(jnp.ones(width), axes=(None,)) if config.skip else None

    def read(self, x: Array, conv: Array, inputs: str) -> tuple[Array, Array, Array, Array]:
        """q, k, v and D; `inputs` names those that read the convolution."""

        def of(name: str) -> Array:
            return conv if name in inputs else x

        q = self.query(of("Q"))
        k = q if self.key is None else self.key(of("K"))
        return q, k, self.value(of("V")), self.direct(of("D"))

    def normed(self, y: Array, dtype: Any) -> Array:
        """(... h v jo) to (... d)."""
        return self.norm(y.reshape(*y.shape[:-3], -1)).astype(dtype)

    def finished(self, y: Array, skipped: Array) -> Array:
        """The output projection, and the skip."""
        y = y if self.out is None else self.out(y)
        if self.skip is None:
            return y
        gain = self.skip[...].astype(y.dtype).reshape((1,) * (y.ndim - 1) + self.skip.shape)
        return y + gain * skipped.astype(y.dtype)


class PLSTMState(NamedTuple):
    """What a layer on sequences carries from one call to the next."""

    window: Array  # (b w-1 d) float32: the last inputs of the convolution; w = 1 without one
    memory: Array  # (b h k v jt) float32


class PLSTM(nnx.Module):
    """A layer on sequences; see the module."""

    def __init__(self, config: PLSTMConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, heads, jt = config.width, config.heads, config.jt
        self.conv = (
            _Conv((config.conv_width,), width, bias=config.conv_bias, rngs=rngs)
            if config.conv_width
            else None
        )
        self.source = Gate(config.source, width, heads, (jt, config.jk, config.jv), rngs=rngs)
        self.transition = _transition(config, heads, rngs)
        self.mark = Gate(config.mark, width, heads, (config.jo, config.jq, jt), rngs=rngs)
        self.shared = _Shared(config, rngs=rngs)

    def init_state(self, batch: int) -> PLSTMState:
        """Zero state."""
        config = self.config
        memory = (batch, config.heads, config.key_width, config.value_width, config.jt)
        window = (config.conv_width or 1) - 1
        return PLSTMState(jnp.zeros((batch, window, config.width)), jnp.zeros(memory))

    def __call__(
        self, x: Array, state: PLSTMState, *, reset: Array | None = None
    ) -> tuple[Array, PLSTMState]:
        """Maps x (b t d) to (b t d).

        Args:
          x: input.
          state: from `init_state` or the call before.
          reset: bool (b t), True where a sequence begins: neither memory nor window reach it.

        Returns:
          y and the next state.
        """
        with jax.named_scope("plstm"):
            conv, window, inputs = x, state.window, self.config.conv_inputs
            if self.conv is not None:
                conv, window = self.conv.in_time(x, state.window, reset)

            def of(name: str) -> Array:
                return conv if name in inputs else x

            q, k, v, direct = self.shared.read(x, conv, inputs)
            gates = self.source(of("S")), self.transition(of("T")), self.mark(of("M")), direct
            y, memory = mark_scan(
                q, k, v, *gates, state.memory, reset=reset, chunk=self.config.chunk
            )
            notes.note("decay", lambda: jnp.linalg.norm(gates[1], ord=2, axis=(-2, -1)))
            notes.note("memory", memory)
            if self.config.gradient_chunk is not None:
                y = self._with_gradient_inside_chunks(y, reset, q, k, v, *gates)
            y = self.shared.finished(self.shared.normed(y, x.dtype), of("P"))
            return y, PLSTMState(window, memory)

    def _with_gradient_inside_chunks(self, y: Array, reset: Array | None, *inputs: Array) -> Array:
        """y with the gradient of what each chunk makes without the state that enters it."""
        length = self.config.gradient_chunk or y.shape[1]
        begins = jnp.broadcast_to(jnp.arange(y.shape[1])[None] % length == 0, y.shape[:2])
        begins = begins if reset is None else begins | reset
        inside, _ = mark_scan(*inputs, reset=begins, chunk=self.config.chunk)
        return inside + jax.lax.stop_gradient(y - inside)


class PLSTMGrid(nnx.Module):
    """A layer on grids; see the module."""

    def __init__(self, config: PLSTMGridConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, heads, jt = config.width, config.heads, config.jt
        count = len(config.orientations)
        travels = config.mode == "P"

        def source() -> Gate:
            sizes = (jt, config.jk, config.jv)
            return Gate(config.source, width, count * heads, sizes, rngs=rngs)

        def transition() -> Transition:
            return _transition(config, count * heads, rngs)

        def mark() -> Gate:
            sizes = (config.jo, config.jq, jt)
            return Gate(config.mark, width, count * heads, sizes, rngs=rngs)

        self.conv = (
            _Conv(config.conv_width, width, bias=config.conv_bias, rngs=rngs)
            if config.conv_width
            else None
        )
        # Angles of the heads from nearly along one axis to nearly along the other.
        angles = jnp.tile(jnp.linspace(-2.0, 2.0, heads), count)
        self.angle = (
            HeadMap(width, count * heads, (), sub_heads=1, bias=angles, rngs=rngs)
            if travels
            else None
        )
        self.source_r, self.source_d = source(), None if travels else source()
        self.transition_r = transition()
        self.transition_d = None if travels else transition()
        self.transition_turn = None if travels else transition()
        self.mark_l, self.mark_u = mark(), None if travels else mark()
        self.shared = _Shared(config, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps x (b x y d) to (b x y d), for any number of nodes along x and y."""
        config = self.config
        with jax.named_scope("plstm_grid"):
            conv = x if self.conv is None else self.conv.on_grid(x)
            q, k, v, direct = self.shared.read(x, conv, config.conv_inputs)
            gates = self.gates(x, conv)
            if config.fused:
                y = grid_scan(q, k, v, gates, direct, orientation=config.directions)
                return self.shared.finished(self.shared.normed(y, x.dtype), x)
            total = jnp.zeros_like(x)
            for i, direction in enumerate(config.directions):
                of_one = jax.tree.map(lambda gate, i=i: gate[:, :, :, i], gates)
                y = grid_scan(q, k, v, of_one, direct, orientation=direction)
                total = total + self.shared.normed(y, x.dtype)
            return self.shared.finished(total / len(config.directions), x)

    def gates(self, x: Array, conv: Array) -> GridGates:
        """Gates (b x y o h ...) of x, or of its convolution where `conv_inputs` says so."""
        config = self.config

        def of(name: str) -> Array:
            return conv if name in config.conv_inputs else x

        source, transition = self.source_r(of("S")), self.transition_r(of("T"))
        mark = self.mark_l(of("M"))
        if self.angle is not None:
            angle = self._angle(of("O"))[..., None, None]
            source, transition = angle[..., None] * source, angle * transition
            gates = GridGates(
                source_r=source,
                source_d=1 - source,
                transition_rl=transition,
                transition_du=1 - transition,
                transition_dl=1 - transition,
                transition_ru=transition,
                mark_l=mark,
                mark_u=mark,
            )
        else:
            assert self.source_d is not None and self.mark_u is not None
            assert self.transition_d is not None and self.transition_turn is not None
            turn = self.transition_turn(of("T"))
            gates = GridGates(
                source_r=source,
                source_d=self.source_d(of("S")),
                transition_rl=transition,
                transition_du=self.transition_d(of("T")),
                transition_dl=turn if config.chirality == "R" else None,
                transition_ru=turn if config.chirality == "L" else None,
                mark_l=mark,
                mark_u=self.mark_u(of("M")),
            )
        return jax.tree.map(self._by_orientation, gates)

    def _by_orientation(self, gate: Array) -> Array:
        """(b x y o*h ...) to (b x y o h ...). A fused layer has the orientations of each head in a
        row, another the heads of each orientation, as in the original.
        """
        lead, rest = gate.shape[:3], gate.shape[4:]
        count, heads = len(self.config.orientations), self.config.heads
        if self.config.fused:
            return jnp.swapaxes(gate.reshape(*lead, heads, count, *rest), 3, 4)
        return gate.reshape(*lead, count, heads, *rest)

    def _angle(self, x: Array) -> Array:
        """a, (b x y o*h), float32."""
        assert self.angle is not None
        bias = self.angle.bias[...].astype(jnp.float32)[None, None, None]
        # The original divides by the width, not by its root.
        read = self.angle(x) - bias
        return jax.nn.sigmoid(bias + self.config.angle_scale / self.config.width * read)


def _transition(config: _LayerConfig, heads: int, rngs: nnx.Rngs) -> Transition:
    options = TransitionLayerConfig(
        width=config.width, heads=heads, tracked=config.jt, options=config.transition
    )
    return options.build(rngs=rngs)


class _Conv(nnx.Module):
    """A causal depthwise convolution, along time or along both axes of a grid."""

    def __init__(self, taps: tuple[int, ...], width: int, *, bias: bool, rngs: nnx.Rngs):
        taps_in_all = 1
        for count in taps:
            taps_in_all *= count
        init = uniform(taps_in_all**-0.5)
        axes = (*(None for _ in taps), "embed")
        self.kernel = nnx.Param(init(rngs.params(), (*taps, width), jnp.float32), axes=axes)
        self.bias = (
            nnx.Param(init(rngs.params(), (width,), jnp.float32), axes=("embed",)) if bias else None
        )

    def in_time(self, x: Array, window: Array, reset: Array | None) -> tuple[Array, Array]:
        """x (b t d) and the inputs before it; see `ops.conv.causal_conv`."""
        return causal_conv(x, self.kernel[...], self._bias(), window, reset)

    def on_grid(self, x: Array) -> Array:
        """x (b x y d); see `ops.conv.causal_conv_2d`."""
        return causal_conv_2d(x, self.kernel[...], self._bias())

    def _bias(self) -> Array:
        kernel = self.kernel[...]
        return (
            jnp.zeros_like(kernel, shape=kernel.shape[-1:]) if self.bias is None else self.bias[...]
        )
