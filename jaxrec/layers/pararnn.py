"""The cells of ParaRNN: a GRU and an LSTM whose channels read only themselves.

    u_t = W x_t + b,   h_t = cell(h_{t-1}, u_t)

with W block-diagonal over heads. What mixes channels is W alone, so that the Jacobian of a step is
diagonal or a 2 x 2 block for each channel, and Newton's method solves all steps at once.

Danieli et al., ParaRNN: unlocking parallel training of nonlinear RNNs for large language models
(2025), arXiv:2510.21450, section 3.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxrec.config import above, at_least, multiple_of, one_of
from jaxrec.layers.activations import Activation, activation
from jaxrec.layers.linear import by_block, uniform
from jaxrec.layers.scan import WHAT_PAYS, Solver, newton_measures, newton_over_time, note_gates
from jaxrec.ops.cells import (
    ParaLSTMParams,
    para_gru,
    para_gru_and_gates,
    para_lstm,
    para_lstm_and_gates,
)
from jaxrec.ops.newton import NewtonInfo
from jaxrec.ops.newton.structure import Kind, Step

CellKind = Literal["gru", "lstm"]
GRU_ROLES = ("update", "reset", "candidate")
LSTM_ROLES = ("forget", "output", "candidate", "cell")
GATED: dict[str, Any] = {"gru": para_gru_and_gates, "lstm": para_lstm_and_gates}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParaRNNConfig:
    """One cell; sizes in channels."""

    cell: CellKind = "gru"
    inputs: int
    width: int  # of the state, or of each half of the LSTM's
    heads: int = 1  # blocks of the input's map
    # Of the GRU: update, reset, candidate. Of the LSTM: forget, output, candidate, cell.
    nonlinearities: tuple[Activation, ...] = ()
    recurrent_limit: float | None = None  # recurrent entries are cut to [-limit, limit]
    recurrent_init: Literal["normal", "cut_normal"] = "normal"
    # Recurrent entries begin uniform in [-scale, scale]; None: as recurrent_init has it.
    recurrent_scale: float | None = None
    input_init: Literal["xavier", "kaiming"] = "xavier"
    bias_init: Literal["spread", "zero"] = "spread"

    def __post_init__(self) -> None:
        one_of(self, "cell", ("gru", "lstm"))
        at_least(self, 1, "inputs", "width")
        multiple_of(self, "heads", "inputs", "width")
        one_of(self, "recurrent_init", ("normal", "cut_normal"))
        one_of(self, "input_init", ("xavier", "kaiming"))
        one_of(self, "bias_init", ("spread", "zero"))
        if self.nonlinearities and len(self.nonlinearities) != len(self.roles):
            raise ValueError(
                f"ParaRNNConfig: nonlinearities of a {self.cell} are those of"
                f" {', '.join(self.roles)}, got {self.nonlinearities}."
            )
        for name in self.nonlinearities:
            activation(name)
        above(self, 0, "recurrent_limit", "recurrent_scale")

    @property
    def roles(self) -> tuple[str, ...]:
        """What the nonlinearities are for."""
        return GRU_ROLES if self.cell == "gru" else LSTM_ROLES

    def build(self, *, rngs: nnx.Rngs) -> "ParaRNN":
        """A freshly initialised layer."""
        return ParaRNN(self, rngs=rngs)


class ParaRNN(nnx.Module):
    """The ParaGRU or ParaLSTM of a configuration."""

    def __init__(self, config: ParaRNNConfig, *, solver: Solver = WHAT_PAYS, rngs: nnx.Rngs):
        d, heads = config.width, config.heads
        self.config, self.solver = config, solver
        self.recurrent = nnx.Param(_recurrent(config, rngs.params(), 3), axes=(None, "mlp"))
        self.peephole = (
            nnx.Param(_recurrent(config, rngs.params(), 2), axes=(None, "mlp"))
            if config.cell == "lstm"
            else None
        )
        fan_in, size = config.inputs // heads, d // heads
        if config.input_init == "kaiming":
            limit = (3 / fan_in) ** 0.5
        else:
            limit = (6 / (fan_in + (d if config.cell == "gru" else size))) ** 0.5
        kernel = uniform(limit)(rngs.params(), (heads, fan_in, 3, size))
        self.kernel = nnx.Param(kernel, axes=("heads", None, None, None))
        bias = jnp.zeros((3, d))
        if config.bias_init == "spread":
            bias = bias.at[0].set(-jnp.linspace(0.0, 1.0, d))
        self.bias = nnx.Param(bias, axes=(None, "mlp"))

    def init_state(self, batch: int) -> Array:
        """Zero state, float32: (b d), or (b 2 d) with c before h."""
        d = self.config.width
        return jnp.zeros((batch, d) if self.config.cell == "gru" else (batch, 2, d))

    def inputs(self, x: Array) -> Array:
        """What x (b t i) gives to each gate, (b t 3 d) float32."""
        kernel = self.kernel[...]
        heads, fan_in, gates, size = kernel.shape
        split = x.astype(kernel.dtype).reshape(*x.shape[:2], heads, fan_in)
        u = by_block(split, kernel.reshape(heads, fan_in, -1), jnp.float32)
        u = jnp.swapaxes(u.reshape(*x.shape[:2], heads, gates, size), 2, 3)
        u = u.reshape(*x.shape[:2], gates, heads * size)
        return u + self.bias[...].astype(u.dtype)[None, None]

    def solve(
        self, u: Array, state: Array, *, reset: Array | None = None
    ) -> tuple[Array, NewtonInfo]:
        """All states (b t d) or (b t 2 d) for the gates' inputs (b t 3 d), and how they came."""
        step, jacobian = self._cell()
        params = self.recurrence()
        h, info = newton_over_time(
            step, params, u, state, jacobian=jacobian, reset=reset, solver=self.solver
        )
        is_usual = not self.config.nonlinearities  # of others none need be a gate
        note_gates(GATED[self.config.cell] if is_usual else None, params, u, state, h, reset)
        return h, info

    def measure(self, x: Array, state: Array, *, reset: Array | None = None) -> dict[str, Array]:
        """What `newton_measures` says of these inputs, and max_recurrent, the largest recurrent
        entry before its limit.
        """
        step, jacobian = self._cell()
        entries = [p[...] for p in (self.recurrent, self.peephole) if p is not None]
        return {"max_recurrent": jnp.max(jnp.abs(jnp.concatenate(entries)))} | newton_measures(
            step,
            self.recurrence(),
            self.inputs(x),
            state,
            jacobian=jacobian,
            reset=reset,
            solver=self.solver,
        )

    def _cell(self) -> tuple[Step, Kind]:
        """The step, and which numbers of its state mix."""
        config = self.config
        functions: dict[str, Any] = {
            role: activation(name)
            for role, name in zip(config.roles, config.nonlinearities, strict=False)
        }
        if config.cell == "gru":
            return functools.partial(para_gru, **functions), "diagonal"
        return functools.partial(para_lstm, **functions), "block"

    def recurrence(self) -> Any:
        """Parameters of the cell, float32, within their limit."""

        def limited(param: nnx.Param) -> Array:
            value = param[...].astype(jnp.float32)
            limit = self.config.recurrent_limit
            return value if limit is None else jnp.clip(value, -limit, limit)

        if self.peephole is None:
            return limited(self.recurrent)
        return ParaLSTMParams(limited(self.recurrent), limited(self.peephole))

    def __call__(
        self, x: Array, state: Array, *, reset: Array | None = None
    ) -> tuple[Array, Array]:
        """Maps x (b t i) to h (b t d) in x's dtype; `reset` bool (b t), True where a document
        begins.
        """
        with jax.named_scope(f"para_{self.config.cell}"):
            states, _ = self.solve(self.inputs(x), state, reset=reset)
            h = states if self.config.cell == "gru" else states[:, :, 1]
            return h.astype(x.dtype), states[:, -1]


def _recurrent(config: ParaRNNConfig, key: Array, rows: int) -> Array:
    shape = (rows, config.width)
    if config.recurrent_scale is not None:
        return uniform(config.recurrent_scale)(key, shape)
    if config.recurrent_init == "normal":
        return jax.random.normal(key, shape) * (2 / (5 * config.width) ** 0.5)
    deviation = config.width**-0.5
    cut = 0.9 / deviation
    return jax.random.truncated_normal(key, -cut, cut, shape) * deviation
