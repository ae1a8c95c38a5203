"""Recurrent cells whose gates read the state, so that their steps run one after another."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer

from jaxrec.config import at_least, one_of
from jaxrec.layers.linear import Linear, truncated_normal, uniform
from jaxrec.layers.scan import (
    WHAT_PAYS,
    Solver,
    newton_measures,
    newton_over_time,
    note_gates,
    slstm_over_time,
)
from jaxrec.ops import cells
from jaxrec.ops.newton import NewtonInfo
from jaxrec.ops.time.slstm import SLSTMState


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

    def __init__(
        self,
        width: int,
        inner: int,
        heads: int,
        *,
        init: Initializer,
        solver: Solver = WHAT_PAYS,
        rngs: nnx.Rngs,
    ):
        if inner % heads:
            raise ValueError(f"SLSTM: inner width {inner} does not divide into {heads} heads.")
        self.solver = solver
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
            h, state = slstm_over_time(
                self.input(x), self.recurrent[...], state, reset=reset, solver=self.solver
            )
            return h.reshape(*h.shape[:2], -1), state


CellKind = Literal["elman", "gru", "lstm"]
GATES = {"elman": 1, "gru": 3, "lstm": 4}
GATED: dict[str, Any] = {"gru": cells.gru_and_gates, "lstm": cells.lstm_and_gates}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellConfig:
    """A cell whose state is mixed by a full matrix; sizes in channels."""

    kind: CellKind
    inputs: int
    width: int  # of the state, or of each half of the LSTM's

    def __post_init__(self) -> None:
        one_of(self, "kind", tuple(GATES))
        at_least(self, 1, "inputs", "width")

    def build(self, *, rngs: nnx.Rngs) -> "Cell":
        """A freshly initialised layer."""
        return Cell(self, rngs=rngs)


class Cell(nnx.Module):
    """The classical cells, h_t = cell(h_{t-1}, W x_t + b): see `ops.cells`.

    The weights begin uniform between -1 / sqrt(width) and its opposite, as PyTorch's do.
    """

    def __init__(self, config: CellConfig, *, solver: Solver = WHAT_PAYS, rngs: nnx.Rngs):
        d, gates = config.width, GATES[config.kind]
        self.config, self.solver = config, solver
        init = uniform(d**-0.5)
        self.input = Linear(
            config.inputs,
            (gates, d),
            init=init,
            axes=("embed", None, "mlp"),
            bias=True,
            bias_init=init,
            rngs=rngs,
        )
        recurrent = init(rngs.params(), (d, gates, d), jnp.float32)
        self.recurrent = nnx.Param(recurrent, axes=(None, None, "mlp"))
        self.candidate_bias = (
            nnx.Param(init(rngs.params(), (d,), jnp.float32), axes=("mlp",))
            if config.kind == "gru"
            else None
        )
        self.peephole = (
            nnx.Param(init(rngs.params(), (3, d), jnp.float32), axes=(None, "mlp"))
            if config.kind == "lstm"
            else None
        )

    def init_state(self, batch: int) -> Array:
        """Zero state, float32: (b d), or (b 2 d) with c before h."""
        d = self.config.width
        return jnp.zeros((batch, 2, d) if self.config.kind == "lstm" else (batch, d))

    def solve(
        self, u: Array, state: Array, *, reset: Array | None = None
    ) -> tuple[Array, NewtonInfo]:
        """All states (b t d) or (b t 2 d) for the gates' inputs (b t g d), and how they came."""
        step, params, u = self._cell(u)
        h, info = newton_over_time(
            step, params, u, state, jacobian="dense", reset=reset, solver=self.solver
        )
        note_gates(GATED.get(self.config.kind), params, u, state, h, reset)
        return h, info

    def measure(self, x: Array, state: Array, *, reset: Array | None = None) -> dict[str, Array]:
        """What `newton_measures` says of these inputs, and max_recurrent, the largest recurrent
        entry. All Jacobians are in memory at once, which is a lot for a wide cell.
        """
        step, params, u = self._cell(self.input(x))
        largest = [jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(params)]
        return {"max_recurrent": jnp.max(jnp.stack(largest))} | newton_measures(
            step, params, u, state, jacobian="dense", reset=reset, solver=self.solver
        )

    def _cell(self, u: Array) -> tuple[Any, Any, Array]:
        """The step, its parameters, and what it reads of (b t g d), all float32."""
        u, recurrent = u.astype(jnp.float32), self.recurrent[...].astype(jnp.float32)
        if self.candidate_bias is not None:
            bias = self.candidate_bias[...].astype(jnp.float32)
            return cells.gru, cells.GRUParams(recurrent, bias), u
        if self.peephole is not None:
            peephole = self.peephole[...].astype(jnp.float32)
            return cells.lstm, cells.LSTMParams(recurrent, peephole), u
        return cells.elman, recurrent[:, 0], u[:, :, 0]

    def __call__(
        self, x: Array, state: Array, *, reset: Array | None = None
    ) -> tuple[Array, Array]:
        """Maps x (b t i) to h (b t d) in x's dtype; `reset` bool (b t), True where a document
        begins.
        """
        with jax.named_scope(self.config.kind):
            states, _ = self.solve(self.input(x), state, reset=reset)
            h = states[:, :, 1] if self.config.kind == "lstm" else states
            return h.astype(x.dtype), states[:, -1]


class Bidirectional(nnx.Module):
    """Two layers side by side, the second of which reads the sequence from its end.

    Schuster & Paliwal, Bidirectional recurrent neural networks (1997).
    """

    def __init__(self, forward: Any, backward: Any):
        self.forward, self.backward = forward, backward

    def init_state(self, batch: int) -> None:
        """Refuses.

        Raises:
          ValueError: always; there is no state to stream from.
        """
        raise ValueError(
            "Bidirectional: it needs the whole sequence at once and has no state to stream from."
        )

    def __call__(
        self, x: Array, state: None = None, *, reset: Array | None = None
    ) -> tuple[Array, None]:
        """Maps x (b t i) to both layers' outputs (b t 2d), the forward one first; no document that
        begins at a True of `reset`, bool (b t), sees another in either direction.
        """
        batch = x.shape[0]
        ends = None
        if reset is not None:
            # Seen from the end, the step before a document's first belongs to another one.
            ends = jnp.flip(jnp.pad(reset[:, 1:], [(0, 0), (0, 1)]), 1)
        left, _ = self.forward(x, self.forward.init_state(batch), reset=reset)
        right, _ = self.backward(jnp.flip(x, 1), self.backward.init_state(batch), reset=ends)
        return jnp.concatenate([left, jnp.flip(right, 1)], axis=-1), None
