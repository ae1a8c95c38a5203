"""The block of RWKV-4: mixing over time by the WKV operator, then mixing of channels, each on its
input blended with that of the step before ("token shift").

    blend(x_t; mu) = mu x_t + (1 - mu) x_{t-1}
    time:      y = W_o (sigmoid(W_r blend(x; mu_r)) wkv(W_k blend(x; mu_k), W_v blend(x; mu_v)))
    channels:  y = sigmoid(W_r blend(x; mu_r)) W_v relu(W_k blend(x; mu_k))^2

Peng et al., RWKV: reinventing RNNs for the transformer era (2023), arXiv:2305.13048, section 3.1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import zeros

from jaxrec.layers.axes import constrain
from jaxrec.layers.linear import Linear, truncated_normal
from jaxrec.layers.norm import LayerNorm
from jaxrec.layers.recurrent_lm import Halving
from jaxrec.layers.scan import wkv_over_time
from jaxrec.ops import notes
from jaxrec.ops.time.scan import delayed
from jaxrec.ops.time.wkv import WKVState


class TimeMixingState(NamedTuple):
    """What mixing over time carries from one call to the next."""

    before: Array  # (b d) float32: the last input
    sums: WKVState  # (b e) float32 each


class RWKVState(NamedTuple):
    """What a block carries from one call to the next."""

    time: TimeMixingState
    channels: Array  # (b d) float32: the last input of the mixing of channels


class TimeMixing(nnx.Module):
    """Mixing over time, of width d, with e channels in the WKV operator.

    What writes to the stream begins at zero, and so do keys and receptance (section 3.4). Rates,
    bonus and blends depend on how deep the layer lies, which `models.rwkv` knows and sets.
    """

    def __init__(self, width: int, inner: int, *, rngs: nnx.Rngs):
        self.mix_key, self.mix_value, self.mix_receptance = (_blend(width) for _ in range(3))
        into = ("embed", "mlp")
        self.key = Linear(width, inner, init=zeros, axes=into, rngs=rngs)
        self.value = Linear(width, inner, init=truncated_normal(width**-0.5), axes=into, rngs=rngs)
        self.receptance = Linear(width, inner, init=zeros, axes=into, rngs=rngs)
        self.log_rate = nnx.Param(jnp.zeros(inner), axes=("mlp",))
        self.bonus = nnx.Param(jnp.zeros(inner), axes=("mlp",))
        self.out = Linear(inner, width, init=zeros, axes=("mlp", "embed"), rngs=rngs)

    def init_state(self, batch: int) -> TimeMixingState:
        """The state before the first step, float32."""
        width, inner = self.value.kernel.shape
        return TimeMixingState(jnp.zeros((batch, width)), WKVState.empty(batch, inner))

    def __call__(
        self, x: Array, state: TimeMixingState, *, reset: Array | None = None
    ) -> tuple[Array, TimeMixingState]:
        """Maps x (b t d) to (b t d); `reset` bool (b t), True where a document begins."""
        with jax.named_scope("time_mixing"):
            shift, last = token_shift(x, state.before, reset)
            k = self.key(_blended(x, shift, self.mix_key))
            v = self.value(_blended(x, shift, self.mix_value))
            r = jax.nn.sigmoid(self.receptance(_blended(x, shift, self.mix_receptance)))
            notes.note("gate", r)
            rate = jnp.exp(self.log_rate[...].astype(jnp.float32))
            y, sums = wkv_over_time(k, v, rate, self.bonus[...], state.sums, reset=reset)
            return self.out(r * y), TimeMixingState(last, sums)


class ChannelMixing(nnx.Module):
    """The feed-forward layer, of width d. Its state is the last input, (b d) float32."""

    def __init__(self, width: int, inner: int, *, rngs: nnx.Rngs):
        self.mix_key, self.mix_receptance = _blend(width), _blend(width)
        self.key = Linear(
            width,
            inner,
            init=truncated_normal(width**-0.5),
            axes=("embed", "mlp"),
            rngs=rngs,
        )
        self.receptance = Linear(width, width, init=zeros, axes=("embed", None), rngs=rngs)
        self.value = Linear(inner, width, init=zeros, axes=("mlp", "embed"), rngs=rngs)

    def init_state(self, batch: int) -> Array:
        """The state before the first step, float32."""
        return jnp.zeros((batch, self.key.kernel.shape[0]))

    def __call__(
        self, x: Array, state: Array, *, reset: Array | None = None
    ) -> tuple[Array, Array]:
        """Maps x (b t d) to (b t d); `reset` bool (b t), True where a document begins."""
        with jax.named_scope("channel_mixing"):
            shift, last = token_shift(x, state, reset)
            k = jnp.square(jax.nn.relu(self.key(_blended(x, shift, self.mix_key))))
            r = jax.nn.sigmoid(self.receptance(_blended(x, shift, self.mix_receptance)))
            return r * self.value(k), last


class RWKVBlock(nnx.Module):
    """x = x + time(norm(x)), then x = x + channels(norm(x)), layer norms throughout.

    With `halving`, x = x + share time(norm(x)), then x = kept (x + share channels(norm(x))).
    """

    def __init__(
        self, width: int, inner: int, mlp_width: int, *, epsilon: float = 1e-5, rngs: nnx.Rngs
    ):
        self.time_norm = LayerNorm(width, epsilon=epsilon)
        self.time = TimeMixing(width, inner, rngs=rngs)
        self.channels_norm = LayerNorm(width, epsilon=epsilon)
        self.channels = ChannelMixing(width, mlp_width, rngs=rngs)

    def init_state(self, batch: int) -> RWKVState:
        """The state before the first step, float32."""
        return RWKVState(self.time.init_state(batch), self.channels.init_state(batch))

    def __call__(
        self,
        x: Array,
        state: RWKVState,
        *,
        reset: Array | None = None,
        halving: Halving | None = None,
    ) -> tuple[Array, RWKVState]:
        """Maps x (b t d) to (b t d); `reset` bool (b t), True where a document begins."""

        def add(x: Array, y: Array) -> Array:
            if halving is not None:
                y = y * halving.share.astype(y.dtype)
            return x + y.astype(x.dtype)

        y, time = self.time(self.time_norm(x), state.time, reset=reset)
        x = add(x, y)
        y, channels = self.channels(self.channels_norm(x), state.channels, reset=reset)
        x = add(x, y)
        if halving is not None:
            x = x * halving.kept.astype(x.dtype)
        return constrain(x, "batch", "time", None), RWKVState(time, channels)


def token_shift(x: Array, before: Array, reset: Array | None) -> tuple[Array, Array]:
    """The input of the step before, zero at resets.

    Args:
      x: input (b t d).
      before: the input before the first step, (b d) float32.
      reset: bool (b t).

    Returns:
      (b t d) in x's dtype, and the last input, float32.
    """
    shift = delayed(x, before.astype(x.dtype))
    if reset is not None:
        shift = jnp.where(reset[..., None], jnp.zeros((), x.dtype), shift)
    return shift, x[:, -1].astype(before.dtype)


def _blend(width: int) -> nnx.Param:
    return nnx.Param(jnp.full(width, 0.5), axes=(None,))


def _blended(x: Array, shift: Array, mix: nnx.Param) -> Array:
    mu = mix[...].astype(x.dtype)[None, None]
    return mu * x + (1 - mu) * shift
