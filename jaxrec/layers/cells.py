"""Recurrent cells whose gates read the state, so that their steps run one after another."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer

from jaxrec.layers.linear import Linear, truncated_normal
from jaxrec.ops.time.slstm import SLSTMState, slstm_scan


def _open_forget_gates(
    key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None
) -> Array:
    return jnp.zeros(shape, dtype).at[2].set(jnp.linspace(3.0, 6.0, shape[-1], dtype=dtype)[None])


class SLSTM(nnx.Module):
    """The sLSTM: y_t = h_t with z, i, f, o = W x_t + b + R h_{t-1}, see `ops.time.slstm`.

    Maps a width d to an inner width e, in heads of n = e / heads channels that R mixes. Forget
    gates begin between sigmoid(3) and sigmoid(6), over the channels of a head.

    Beck et al., xLSTM: extended long short-term memory (2024), arXiv:2405.04517, section 2.2.
    """

    def __init__(self, width: int, inner: int, heads: int, *, init: Initializer, rngs: nnx.Rngs):
        if inner % heads:
            raise ValueError(f"SLSTM: inner width {inner} does not divide into {heads} heads.")
        size = inner // heads
        axes = ("embed", None, "heads", "head")
        self.input = Linear(
            width,
            (4, heads, size),
            init=init,
            axes=axes,
            bias=True,
            bias_init=_open_forget_gates,
            rngs=rngs,
        )
        matrix = truncated_normal(size**-0.5)(rngs.params(), (4, heads, size, size))
        self.recurrent = nnx.Param(matrix, axes=(None, "heads", None, None))

    def init_state(self, batch: int) -> SLSTMState:
        """The state before the first step, float32."""
        _, heads, size, _ = self.recurrent.shape
        return SLSTMState.empty(batch, heads, size)

    def __call__(
        self, x: Array, state: SLSTMState, *, reset: Array | None = None
    ) -> tuple[Array, SLSTMState]:
        """Maps x (b t d) to h (b t e); `reset` bool (b t), True where a document begins."""
        with jax.named_scope("slstm"):
            h, state = slstm_scan(self.input(x), self.recurrent[...], state, reset=reset)
            return h.reshape(*h.shape[:2], -1), state
