"""The mixer of xLSTM 7B: the matrix memory of the mLSTM between projections.

    q, k, v = W_q x, W_k x, W_v x;   i = cap(W_i x + b_i),   log f = log sigmoid(cap(W_f x + b_f))
    y = W_o (sigmoid(W_g x) norm(mlstm(q, k, v; i, f)))

with gates of one number a head, cap(z) = c tanh(z / c), and a layer norm of each head by itself.

Beck et al., xLSTM 7B: a recurrent LLM for fast and efficient inference (2025), arXiv:2503.13427,
section 3.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer, constant, zeros

from jaxrec.layers.linear import Linear
from jaxrec.layers.norm import LayerNorm
from jaxrec.layers.scan import mlstm_over_time
from jaxrec.ops import notes
from jaxrec.ops.time import MLSTMState


def _spread_forget_bias(
    key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None
) -> Array:
    """Forget gates begin between sigmoid(3) and sigmoid(6), a longer memory for each next head."""
    return jnp.linspace(3.0, 6.0, shape[0], dtype=dtype)


class MLSTM(nnx.Module):
    """The mixer, of width d, whose heads share `keys` and `values` channels among them.

    `gate_soft_cap` is c; None: gates have no cap. `bias` is that of all projections and of the norm
    of heads; input and forget gates have one always. The weights of all gates begin at zero, input
    gates at e^-10. `chunk` is that of `mlstm_scan`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        keys: int,
        values: int,
        *,
        bias: bool = False,
        gate_soft_cap: float | None = 15.0,
        norm_epsilon: float = 1e-6,
        epsilon: float = 1e-6,
        chunk: int = 64,
        init: Initializer,
        out_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        def into_heads(channels: int) -> Linear:
            size = (heads, channels // heads)
            axes = ("embed", "heads", "head")
            return Linear(width, size, init=init, axes=axes, bias=bias, rngs=rngs)

        def gate(bias_init: Initializer) -> Linear:
            return Linear(
                width,
                heads,
                init=zeros,
                axes=("embed", "heads"),
                bias=True,
                bias_init=bias_init,
                rngs=rngs,
            )

        self.query, self.key, self.value = into_heads(keys), into_heads(keys), into_heads(values)
        self.input_gate, self.forget_gate = gate(constant(-10.0)), gate(_spread_forget_bias)
        self.output_gate = Linear(
            width, values, init=zeros, axes=("embed", "heads"), bias=bias, rngs=rngs
        )
        self.norm = LayerNorm(values, epsilon=norm_epsilon, bias=bias, groups=heads)
        self.out = Linear(
            values,
            width,
            init=out_init or init,
            axes=("heads", "embed"),
            bias=bias,
            rngs=rngs,
        )
        self.gate_soft_cap, self.epsilon, self.chunk = gate_soft_cap, epsilon, chunk

    def init_state(self, batch: int) -> MLSTMState:
        """The state before the first step, float32."""
        _, heads, keys = self.key.kernel.shape
        return MLSTMState.empty(batch, heads, keys, self.value.kernel.shape[2])

    def __call__(
        self, x: Array, state: MLSTMState, *, reset: Array | None = None
    ) -> tuple[Array, MLSTMState]:
        """Maps x (b t d) to (b t d).

        Args:
          x: input (b t d).
          state: from `init_state` or the call before.
          reset: bool (b t), True where a document begins: no memory reaches across it.
        """
        with jax.named_scope("mlstm"):
            i = self._capped(self.input_gate(x))
            log_f = jax.nn.log_sigmoid(self._capped(self.forget_gate(x)))
            y, state = mlstm_over_time(
                self.query(x),
                self.key(x),
                self.value(x),
                i,
                log_f,
                state,
                reset=reset,
                chunk=self.chunk,
                eps=self.epsilon,
            )
            y = self.norm(y.reshape(*y.shape[:2], -1))
            gate = jax.nn.sigmoid(self.output_gate(x))
            notes.note("gate", gate)
            return self.out(gate * y), state

    def _capped(self, gate: Array) -> Array:
        gate = gate.astype(jnp.float32)
        if self.gate_soft_cap is None:
            return gate
        return self.gate_soft_cap * jnp.tanh(gate / self.gate_soft_cap)
