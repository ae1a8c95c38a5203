"""Recurrent cells as functions of one step, (parameters, state, input) -> state, for `newton_scan`.

States are (b d), or (b 2 d) with the cell state c before h; u is what the input gives to each gate,
its bias included, (b g d). All arguments are of one dtype, float32 or float64.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Nonlinearity = Callable[[Array], Array]


def _mixed(h: Array, recurrent: Array) -> Array:
    """(b d) through (d g d). On accelerators less precise products, which are the default there,
    would leave a residual that no iteration can lower.
    """
    return jnp.einsum("bd,dge->bge", h, recurrent, precision="highest")


def elman(recurrent: Array, h: Array, u: Array) -> Array:
    """h' = tanh(u + R h), with R (d d) multiplied from the right and u (b d).

    Elman, Finding structure in time (1990).
    """
    return jnp.tanh(u + jnp.matmul(h, recurrent, precision="highest"))


class GRUParams(NamedTuple):
    """Of `gru`."""

    recurrent: Array  # (d 3 d): from h to reset, update and candidate
    bias: Array  # (d): of what the candidate gets from h


def gru(params: GRUParams, h: Array, u: Array) -> Array:
    """r, z = sigmoid(u + R h),  n = tanh(u_n + r (R_n h + b)),  h' = n + z (h - n).

    Cho et al. (2014), arXiv:1406.1078, with the reset behind the product, as cuDNN and PyTorch have
    it.
    """
    return gru_and_gates(params, h, u)[0]


def gru_and_gates(params: GRUParams, h: Array, u: Array) -> tuple[Array, tuple[Array, ...]]:
    """`gru` with r and z, (b d) each."""
    mixed = _mixed(h, params.recurrent)
    r, z = (jax.nn.sigmoid(u[:, i] + mixed[:, i]) for i in range(2))
    n = jnp.tanh(u[:, 2] + r * (mixed[:, 2] + params.bias[None]))
    return n + z * (h - n), (r, z)


class LSTMParams(NamedTuple):
    """Of `lstm`."""

    recurrent: Array  # (d 4 d): from h to input, forget and output gate and candidate
    peephole: Array  # (3 d): from c to the input and forget gate, from the new c to the output gate


def lstm(params: LSTMParams, state: Array, u: Array) -> Array:
    """i, f = sigmoid(u + R h + p c),  c' = f c + i tanh(u_n + R_n h),
    o = sigmoid(u_o + R_o h + p_o c'),  h' = o tanh(c').

    Gers, Schraudolph & Schmidhuber, Learning precise timing with LSTM recurrent networks (2002).
    """
    return lstm_and_gates(params, state, u)[0]


def lstm_and_gates(params: LSTMParams, state: Array, u: Array) -> tuple[Array, tuple[Array, ...]]:
    """`lstm` with i, f and o, (b d) each."""
    c, h = state[:, 0], state[:, 1]
    gates, peephole = u + _mixed(h, params.recurrent), params.peephole[:, None]
    i, f = (jax.nn.sigmoid(gates[:, k] + peephole[k] * c) for k in range(2))
    c = f * c + i * jnp.tanh(gates[:, 3])
    o = jax.nn.sigmoid(gates[:, 2] + peephole[2] * c)
    return jnp.stack([c, o * jnp.tanh(c)], axis=1), (i, f, o)


def para_gru(
    recurrent: Array,
    h: Array,
    u: Array,
    *,
    update: Nonlinearity = jax.nn.sigmoid,
    reset: Nonlinearity = jax.nn.sigmoid,
    candidate: Nonlinearity = jnp.tanh,
) -> Array:
    """z, r = sigmoid(a h + u),  n = tanh(a_n h r + u_n),  h' = (1 - z) h + z n.

    Each channel reads only itself: `recurrent` is (3 d), for z, r and n.

    Danieli et al., ParaRNN (2025), arXiv:2510.21450, section 3.
    """
    return para_gru_and_gates(recurrent, h, u, update, reset, candidate)[0]


def para_gru_and_gates(
    recurrent: Array,
    h: Array,
    u: Array,
    update: Nonlinearity = jax.nn.sigmoid,
    reset: Nonlinearity = jax.nn.sigmoid,
    candidate: Nonlinearity = jnp.tanh,
) -> tuple[Array, tuple[Array, ...]]:
    """`para_gru` with z and r, (b d) each."""
    a = recurrent[:, None]
    z, r = update(a[0] * h + u[:, 0]), reset(a[1] * h + u[:, 1])
    n = candidate(a[2] * h * r + u[:, 2])
    return (1 - z) * h + z * n, (z, r)


class ParaLSTMParams(NamedTuple):
    """Of `para_lstm`."""

    recurrent: Array  # (3 d): from h to forget and output gate and candidate
    peephole: Array  # (2 d): from c to the forget gate, from the new c to the output gate


def para_lstm(
    params: ParaLSTMParams,
    state: Array,
    u: Array,
    *,
    forget: Nonlinearity = jax.nn.sigmoid,
    output: Nonlinearity = jax.nn.sigmoid,
    candidate: Nonlinearity = jnp.tanh,
    cell: Nonlinearity = jnp.tanh,
) -> Array:
    """f = sigmoid(a h + p c + u),  c' = f c + (1 - f) tanh(a_n h + u_n),
    o = sigmoid(a_o h + p_o c' + u_o),  h' = o tanh(c').

    Channels are apart: the Jacobian is a 2 x 2 block for each.

    Danieli et al., ParaRNN (2025), arXiv:2510.21450, section 3.
    """
    return para_lstm_and_gates(params, state, u, forget, output, candidate, cell)[0]


def para_lstm_and_gates(
    params: ParaLSTMParams,
    state: Array,
    u: Array,
    forget: Nonlinearity = jax.nn.sigmoid,
    output: Nonlinearity = jax.nn.sigmoid,
    candidate: Nonlinearity = jnp.tanh,
    cell: Nonlinearity = jnp.tanh,
) -> tuple[Array, tuple[Array, ...]]:
    """`para_lstm` with f and o, (b d) each."""
    (c, h), (a, peephole) = (state[:, 0], state[:, 1]), (p[:, None] for p in params)
    f = forget(a[0] * h + u[:, 0] + peephole[0] * c)
    c = f * c + (1 - f) * candidate(a[2] * h + u[:, 2])
    o = output(a[1] * h + u[:, 1] + peephole[1] * c)
    return jnp.stack([c, o * cell(c)], axis=1), (f, o)
