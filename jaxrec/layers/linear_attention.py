"""Linear attention: heads whose keys and values are kept in a matrix state, with the gates, keys
and positions of RetNet, GLA, DeltaNet, Gated DeltaNet and KDA.

    q = W_q x, k = W_k x, v = W_v x, each through a short convolution and silu where there is one;
    S_t = gated or delta rule of (k_t, v_t) with log decay g_t and write strength beta_t;
    y_t = W_o (norm(S_t^T q_t / sqrt(k)) * silu(W_z x_t)),   norm over each head

    gate          log decay g                              of           system
    "none"        0                                        -            linear attention, DeltaNet
    "constant"    log(1 - 2^(-5 - h)), h = 0, 1, ..        each head    RetNet
    "logistic"    logsigmoid(W_2 W_1 x + bias) / 16        each key     GLA
    "step"        -e^a softplus(W x + bias)                each head    Gated DeltaNet
    "key_step"    -e^a softplus(W_2 W_1 x + bias)          each key     KDA, with a of each head

Under the delta rule beta = sigmoid(W_b x), and queries and keys have length 1.

Sun et al., Retentive network (2023), arXiv:2307.08621; Yang et al., Gated linear attention
transformers with hardware-efficient training (2023), arXiv:2312.06635, section 4.4; Yang et al.,
Parallelizing linear transformers with the delta rule over sequence length (2024), arXiv:2406.06484;
Yang et al., Gated delta networks (2024), arXiv:2412.06464; Kimi Linear (2025), arXiv:2510.26692.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.nn.initializers import Initializer

from jaxrec.layers.activations import silu
from jaxrec.layers.linear import Linear, truncated_normal
from jaxrec.layers.mamba import log_uniform_step_bias
from jaxrec.layers.norm import RMSNorm
from jaxrec.layers.scan import matrix_scan_over_time
from jaxrec.ops import notes, rotary, segments
from jaxrec.ops.conv import causal_conv
from jaxrec.ops.time.matrix_scan import Rule

Gate = Literal["none", "constant", "logistic", "step", "key_step"]
LOGISTIC_TEMPERATURE = 16.0  # tau of GLA, equation 4.4
LENGTH_EPSILON = 1e-6  # added to the squared length of keys and queries


class LinearAttentionState(NamedTuple):
    """What a layer carries from one call to the next."""

    hidden: Array  # (b h k v) float32: S
    windows: tuple[Array, ...]  # of q, k, v: the last inputs of the convolutions, or none
    position: Array  # int32 (b): of the next token, counted from the last reset


class ShortConv(nnx.Module):
    """silu of a causal convolution of every channel of every head, without a bias."""

    def __init__(self, taps: int, heads: int, width: int, *, rngs: nnx.Rngs):
        kernel = truncated_normal(taps**-0.5)(rngs.params(), (taps, heads, width))
        self.kernel = nnx.Param(kernel, axes=("conv", "heads", None))

    def init_state(self, batch: int) -> Array:
        """Zeros (b w-1 e), float32, for e channels of all heads."""
        taps, heads, width = self.kernel.shape
        return jnp.zeros((batch, taps - 1, heads * width))

    def __call__(self, x: Array, window: Array, reset: Array | None) -> tuple[Array, Array]:
        """Maps x (b t h k) to (b t h k); see `ops.conv.causal_conv`."""
        batch, time, heads, width = x.shape
        kernel = self.kernel[...].reshape(-1, heads * width)
        flat = x.reshape(batch, time, heads * width)
        y, window = causal_conv(flat, kernel, jnp.zeros(heads * width), window, reset)
        return silu(y).reshape(x.shape), window


class DecayGate(nnx.Module):
    """Log decays from the input, see the table above; every kind but "none" and "constant"."""

    def __init__(
        self,
        width: int,
        heads: int,
        key_width: int,
        kind: Gate,
        *,
        rank: int,
        init: Initializer,
        rngs: nnx.Rngs,
    ):
        by_key = kind != "step"
        outputs = (heads, key_width) if by_key else (heads,)
        axes = ("heads", None) if by_key else ("heads",)
        self.down = (
            Linear(width, rank, init=init, axes=("embed", None), rngs=rngs) if by_key else None
        )
        self.up = Linear(
            rank if by_key else width,
            outputs,
            init=truncated_normal(rank**-0.5) if by_key else init,
            axes=(None if by_key else "embed", *axes),
            bias=True,
            bias_init=(
                jax.nn.initializers.zeros
                if kind == "logistic"
                else log_uniform_step_bias(1e-3, 1e-1, 1e-4)
            ),
            rngs=rngs,
        )
        rates = jax.random.uniform(rngs.params(), (heads,), minval=1.0, maxval=16.0)
        self.log_rate = None if kind == "logistic" else nnx.Param(jnp.log(rates), axes=("heads",))

    def __call__(self, x: Array) -> Array:
        """Maps x (b t d) to log decays <= 0, (b t h) or (b t h k), float32."""
        low = x if self.down is None else self.down(x)
        raw = self.up(low).astype(jnp.float32)
        if self.log_rate is None:
            return jax.nn.log_sigmoid(raw) / LOGISTIC_TEMPERATURE
        rate = jnp.exp(self.log_rate[...].astype(jnp.float32))
        return -rate.reshape((1, 1, -1) + (1,) * (raw.ndim - 3)) * jax.nn.softplus(raw)


class LinearAttention(nnx.Module):
    """The layer, of width d, with h heads of key width k and value width v.

    Args:
      width: d.
      heads: h.
      key_width: k.
      value_width: v.
      rule: how the state is written, see `ops.time.matrix_scan`.
      gate: where decays come from, see above.
      gate_rank: bottleneck through which the decays of every key come.
      beta_scale: beta is this times a sigmoid; at 2 the delta rule can turn a key's value round.
      conv_width: taps of the convolutions of q, k and v; None: there are none, and no silu.
      rotary_base: of the rotation of q and k by their position; None: they are not rotated.
      output_gate: whether what is read is gated by silu(W_z x).
      chunk: see `ops.time.matrix_scan`.
      norm_epsilon: of the norm of what a head reads.
      init: of the projections of x.
      out_init: of the last one.
      rngs: the usual.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        key_width: int,
        value_width: int,
        *,
        rule: Rule = "gated",
        gate: Gate = "none",
        gate_rank: int = 16,
        beta_scale: float = 1.0,
        conv_width: int | None = None,
        rotary_base: float | None = None,
        output_gate: bool = True,
        chunk: int = 64,
        norm_epsilon: float = 1e-6,
        init: Initializer,
        out_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        if gate not in get_args(Gate):
            raise ValueError(
                f"LinearAttention: gate must be one of {get_args(Gate)}, got {gate!r}."
            )

        def projection(size: int) -> Linear:
            axes = ("embed", "heads", None)
            return Linear(width, (heads, size), init=init, axes=axes, rngs=rngs)

        def convolution(size: int) -> ShortConv | None:
            return None if conv_width is None else ShortConv(conv_width, heads, size, rngs=rngs)

        self.query, self.key = projection(key_width), projection(key_width)
        self.value = projection(value_width)
        self.query_conv, self.key_conv = convolution(key_width), convolution(key_width)
        self.value_conv = convolution(value_width)
        self.decay_gate = (
            None
            if gate in ("none", "constant")
            else DecayGate(width, heads, key_width, gate, rank=gate_rank, init=init, rngs=rngs)
        )
        self.write = (
            Linear(width, (heads,), init=init, axes=("embed", "heads"), rngs=rngs)
            if rule == "delta"
            else None
        )
        self.read_norm = RMSNorm(value_width, epsilon=norm_epsilon)
        self.output_gate = projection(value_width) if output_gate else None
        self.out = Linear(
            heads * value_width,
            width,
            init=out_init or init,
            axes=("heads", "embed"),
            rngs=rngs,
        )
        self.rule, self.gate, self.beta_scale = rule, gate, beta_scale
        self.rotary_base, self.chunk = rotary_base, chunk

    def init_state(self, batch: int) -> LinearAttentionState:
        """Zero state, float32."""
        _, heads, key_width = self.query.kernel.shape
        convs = (self.query_conv, self.key_conv, self.value_conv)
        return LinearAttentionState(
            jnp.zeros((batch, heads, key_width, self.value.kernel.shape[-1])),
            tuple(conv.init_state(batch) for conv in convs if conv is not None),
            jnp.zeros(batch, jnp.int32),
        )

    def __call__(
        self, x: Array, state: LinearAttentionState, *, reset: Array | None = None
    ) -> tuple[Array, LinearAttentionState]:
        """Maps x (b t d) to (b t d).

        Args:
          x: input (b t d).
          state: from `init_state` or the call before.
          reset: bool (b t), True where a document begins: neither the state nor the convolutions
            reach back across it, and positions are counted from there.
        """
        with jax.named_scope("linear_attention"):
            q, k, v, windows = self._project(x, state.windows, reset)
            position = _positions(state.position, x.shape[1], reset)
            if self.rotary_base is not None:
                angles = rotary.rotation(position, q.shape[-1], self.rotary_base)
                q, k = (rotary.rotate(z, angles, "half") for z in (q, k))
            beta = None
            if self.write is not None:
                q, k = _of_length_one(q), _of_length_one(k)
                opened = jax.nn.sigmoid(self.write(x).astype(jnp.float32))
                notes.note("gate", opened)
                beta = self.beta_scale * opened
            y, hidden = matrix_scan_over_time(
                q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype),
                k,
                v,
                self._log_decay(x),
                state.hidden,
                beta=beta,
                rule=self.rule,
                reset=reset,
                chunk=self.chunk,
            )
            y = self.read_norm(y)
            if self.output_gate is not None:
                y = y * silu(self.output_gate(x))
            y = self.out(y.reshape(*x.shape[:2], -1))
            return y, LinearAttentionState(hidden, windows, position[:, -1] + 1)

    def _project(
        self, x: Array, windows: tuple[Array, ...], reset: Array | None
    ) -> tuple[Array, Array, Array, tuple[Array, ...]]:
        """Queries, keys and values, and the next windows of their convolutions."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.query_conv is None or self.key_conv is None or self.value_conv is None:
            return q, k, v, ()
        q, of_q = self.query_conv(q, windows[0], reset)
        k, of_k = self.key_conv(k, windows[1], reset)
        v, of_v = self.value_conv(v, windows[2], reset)
        return q, k, v, (of_q, of_k, of_v)

    def _log_decay(self, x: Array) -> Array | None:
        if self.decay_gate is not None:
            return self.decay_gate(x)
        if self.gate == "none":
            return None
        heads = self.query.kernel.shape[1]
        decay = np.log1p(-(2.0 ** (-5.0 - np.arange(heads)))).astype(np.float32)
        # Hidden from the compiler, which would spend seconds on sums of a constant of this size.
        decay = lax.optimization_barrier(jnp.asarray(decay))
        return jnp.broadcast_to(decay[None, None], (*x.shape[:2], heads))


def _positions(start: Array, time: int, reset: Array | None) -> Array:
    """Positions int32 (b t), the first of them `start` (b) unless it is reset."""
    if reset is None:
        return start[:, None] + jnp.arange(time, dtype=jnp.int32)[None]
    return segments.positions(reset, start)


def _of_length_one(x: Array) -> Array:
    """x / |x| over the last axis, by sums in float32."""
    wide = x.astype(jnp.float32)
    squared = jnp.sum(wide**2, axis=-1, keepdims=True)
    return (wide * lax.rsqrt(squared + LENGTH_EPSILON)).astype(x.dtype)
