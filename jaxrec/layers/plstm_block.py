"""Residual blocks around pLSTM layers.

    post-up:   x = x + mixer(norm(x));   x = x + W_down act(W_up norm(x))
    pre-up:    (u, g) = W_up norm(x);   x = x + W_down (mixer(u) * act(g))

What is added may be scaled for each channel, and dropped for a whole sample in training. A post-up
block that is gated has W_down (u * act(g)); a pre-up block that is not gated has no g.

Pöppel et al. (2025), arXiv:2506.11997, section 4.4; Touvron et al., Going deeper with image
transformers (2021), arXiv:2103.17239 (scales); Huang et al., Deep networks with stochastic depth
(2016), arXiv:1603.09382 (dropping).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxrec.config import at_least, one_of
from jaxrec.layers.activations import silu
from jaxrec.layers.axes import constrain
from jaxrec.layers.linear import Linear
from jaxrec.layers.norm import LayerNorm, RMSNorm
from jaxrec.layers.plstm import PLSTM, Norm, PLSTMConfig, PLSTMGridConfig, PLSTMState
from jaxrec.layers.plstm_gates import small_init

Kind = Literal["post_up", "pre_up"]
ActivationName = Literal["gelu", "silu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """A norm of the stream."""

    kind: Norm = "rms"
    bias: bool = False
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        one_of(self, "kind", get_args(Norm))

    def build(self, width: int) -> RMSNorm | LayerNorm:
        """A norm of so many channels."""
        norm = RMSNorm if self.kind == "rms" else LayerNorm
        return norm(width, epsilon=self.epsilon, bias=self.bias)


_NORM = NormConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _BlockConfig:
    """What blocks on sequences and on grids share."""

    width: int
    kind: Kind
    inner: int  # width of u; in a pre-up block that of the mixer
    gated: bool
    activation: ActivationName
    residual: bool = True  # x is added
    scaled: bool = False  # what is added has a gain for each channel; post-up only
    drop: float = 0.0  # share of the samples for which it is left out; post-up only
    norm: NormConfig = _NORM

    def __post_init__(self) -> None:
        at_least(self, 1, "width", "inner")
        one_of(self, "kind", get_args(Kind))
        one_of(self, "activation", get_args(ActivationName))
        if not 0 <= self.drop < 1:
            raise ValueError(f"{type(self).__name__}: drop must lie in [0, 1), got {self.drop}.")
        if self.kind == "pre_up" and (self.scaled or self.drop):
            raise ValueError(
                f"{type(self).__name__}: a pre-up block is neither scaled nor dropped."
            )
        wanted = self.width if self.kind == "post_up" else self.inner
        got = self.mixer.width  # type: ignore[attr-defined]
        if got != wanted:
            raise ValueError(
                f"{type(self).__name__}: the mixer of a {self.kind} block must have the width"
                f" {wanted}, got {got}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceBlockConfig(_BlockConfig):
    """A block on sequences."""

    mixer: PLSTMConfig
    kind: Kind = "pre_up"
    gated: bool = True
    activation: ActivationName = "silu"

    def build(self, *, rngs: nnx.Rngs) -> "Block":
        """A freshly initialised block."""
        return Block(self, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridBlockConfig(_BlockConfig):
    """A block on grids."""

    mixer: PLSTMGridConfig
    kind: Kind = "post_up"
    gated: bool = False
    activation: ActivationName = "gelu"

    def build(self, *, rngs: nnx.Rngs) -> "Block":
        """A freshly initialised block."""
        return Block(self, rngs=rngs)


class Block(nnx.Module):
    """A block; see the module."""

    def __init__(self, config: SequenceBlockConfig | GridBlockConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, inner = config.width, config.inner
        self.norm = config.norm.build(width)
        self.mixer: Any = config.mixer.build(rngs=rngs)
        outputs: Any = (2, inner) if config.gated else inner
        axes = ("embed", None, "mlp") if config.gated else ("embed", "mlp")
        self.up = Linear(width, outputs, init=small_init(width), axes=axes, bias=True, rngs=rngs)
        self.down = Linear(
            inner, width, init=small_init(inner), axes=("mlp", "embed"), bias=True, rngs=rngs
        )
        post_up = config.kind == "post_up"
        self.mlp_norm = config.norm.build(width) if post_up else None
        self.mixer_scale = nnx.Param(jnp.ones(width), axes=(None,)) if config.scaled else None
        self.mlp_scale = nnx.Param(jnp.ones(width), axes=(None,)) if config.scaled else None

    def init_state(self, batch: int) -> PLSTMState:
        """That of the mixer; only on sequences."""
        return self.mixer.init_state(batch)

    def __call__(
        self,
        x: Array,
        state: PLSTMState | None = None,
        *,
        reset: Array | None = None,
        key: Array | None = None,
    ) -> tuple[Array, PLSTMState | None]:
        """Maps x (b t d) to (b t d), or (b x y d) to (b x y d).

        Args:
          x: the stream.
          state: of the mixer; None on grids, which have none.
          reset: bool (b t), of the mixer; on sequences only.
          key: of what is dropped; None drops nothing.
        """
        if self.mlp_norm is None:
            u, g = self._upwards(self.norm(x))
            y, state = self._mixed(u, state, reset)
            y = self.down(y if g is None else y * self._activation(g))
            return self._added(x, y, None, None), state
        keys = (None, None) if key is None else jax.random.split(key)
        y, state = self._mixed(self.norm(x), state, reset)
        x = self._added(x, y, self.mixer_scale, keys[0])
        with jax.named_scope("mlp"):
            u, g = self._upwards(self.mlp_norm(x))
            y = self.down(self._activation(u) if g is None else u * self._activation(g))
        return self._added(x, y, self.mlp_scale, keys[1]), state

    def _mixed(
        self, x: Array, state: PLSTMState | None, reset: Array | None
    ) -> tuple[Array, PLSTMState | None]:
        if isinstance(self.mixer, PLSTM):
            assert state is not None
            return self.mixer(x, state, reset=reset)
        return self.mixer(x), None

    def _upwards(self, x: Array) -> tuple[Array, Array | None]:
        y = self.up(x)
        return (y[..., 0, :], y[..., 1, :]) if self.config.gated else (y, None)

    @property
    def _activation(self) -> Callable[[Array], Array]:
        return silu if self.config.activation == "silu" else _gelu

    def _added(self, x: Array, y: Array, scale: Any, key: Array | None) -> Array:
        if not self.config.residual:
            return y.astype(x.dtype)
        if scale is not None:
            gain = scale[...].astype(y.dtype)
            y = gain.reshape((1,) * (y.ndim - 1) + gain.shape) * y
        x = x + dropped(y.astype(x.dtype), self.config.drop, key)
        return constrain(
            x, "batch", *("time" if x.ndim == 3 else None for _ in x.shape[1:-1]), None
        )


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def dropped(y: Array, share: float, key: Array | None) -> Array:
    """y (b ...) with zeros for a share of the samples, and more of the others so that the mean is
    kept; y itself without a key.
    """
    if key is None or share == 0:
        return y
    kept = jax.random.bernoulli(key, 1 - share, (y.shape[0],) + (1,) * (y.ndim - 1))
    return jnp.where(kept, y / (1 - share), jnp.zeros((), y.dtype))
