"""The cells' start, their states, and what wraps them; their recurrences are in the laws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.analysis.monitors import gate_numbers
from jaxrec.layers.cells import SLSTM, Bidirectional, CellConfig
from jaxrec.layers.pararnn import ParaRNNConfig
from jaxrec.ops import notes
from tests import references

INIT = jax.nn.initializers.normal()


def build(inner=6, heads=2):
    return SLSTM(8, inner, heads, init=INIT, rngs=nnx.Rngs(0))


def test_forget_gates_begin_open():
    bias = build().input.bias[...]
    np.testing.assert_array_equal(bias[2], [[3, 4.5, 6]] * 2)
    np.testing.assert_array_equal(np.delete(bias, 2, axis=0), np.zeros((3, 2, 3)))


def test_equals_the_loop():
    cell = build()
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    h, _ = jax.jit(cell)(x, cell.init_state(2))
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(cell)[1]))
    gates = references.linear(params["input"], x)
    never = np.zeros((2, 5), bool)
    want, *_ = references.slstm(gates, params["recurrent"], *np.zeros((3, 2, 2, 3)), never)
    np.testing.assert_allclose(h, want.reshape(2, 5, 6), atol=1e-6)


def test_the_state_is_float32_whatever_the_activations():
    cell = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), build())
    x = jax.ShapeDtypeStruct((2, 5, 8), jnp.bfloat16)
    h, state = jax.eval_shape(lambda cell, x: cell(x, cell.init_state(2)), cell, x)
    assert (h.shape, h.dtype) == ((2, 5, 6), jnp.bfloat16)
    assert all((leaf.shape, leaf.dtype) == ((2, 2, 3), jnp.float32) for leaf in state)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="inner width 6 does not divide into 4 heads"):
        build(heads=4)


kinds = pytest.mark.parametrize("kind", ["elman", "gru", "lstm"])


def classical(kind, seed=0, inputs=5, width=4):
    return CellConfig(kind=kind, inputs=inputs, width=width).build(rngs=nnx.Rngs(seed))


@kinds
def test_newtons_method_gives_the_same(kind):
    cell = classical(kind)
    x = np.random.default_rng(0).normal(size=(2, 40, 5)).astype(np.float32)
    run = jax.jit(lambda cell, x: cell(x, cell.init_state(2)))
    want, want_state = run(cell, x)
    cell.solver = dataclasses.replace(cell.solver, method="newton", window=16)
    got, state = run(cell, x)
    np.testing.assert_allclose(got, want, atol=2e-6)
    np.testing.assert_allclose(state, want_state, atol=2e-6)
    _, info = cell.solve(cell.input(x), cell.init_state(2))
    assert info.converged
    assert info.iterations <= 5


@kinds
def test_weights_begin_within_the_width(kind):
    leaves = jax.tree.leaves(classical(kind, width=16))
    assert all(0.9 * 0.25 < np.max(np.abs(leaf)) <= 0.25 for leaf in leaves)


@kinds
def test_the_state_of_a_classical_cell_is_float32(kind):
    cell = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), classical(kind))
    x = jax.ShapeDtypeStruct((2, 5, 5), jnp.bfloat16)
    h, state = jax.eval_shape(lambda cell, x: cell(x, cell.init_state(2)), cell, x)
    assert (h.shape, h.dtype) == ((2, 5, 4), jnp.bfloat16)
    assert state.dtype == jnp.float32


def test_two_directions_see_no_other_document():
    layer = Bidirectional(classical("gru", 0), classical("lstm", 1))
    x = np.random.default_rng(0).normal(size=(1, 7, 5)).astype(np.float32)
    reset = np.zeros((1, 7), bool)
    reset[0, 3] = True
    run = jax.jit(lambda layer, x, reset: layer(x, reset=reset)[0])
    whole = run(layer, x, reset)
    assert whole.shape == (1, 7, 8)
    for part in (slice(0, 3), slice(3, 7)):
        alone = run(layer, x[:, part], None)
        np.testing.assert_allclose(whole[:, part], alone, atol=1e-6)
    backward, _ = layer.backward(x[:, ::-1], layer.backward.init_state(1))
    np.testing.assert_allclose(run(layer, x, None)[..., 4:], backward[:, ::-1], atol=1e-6)


def test_two_directions_have_no_state_to_stream_from():
    layer = Bidirectional(classical("gru"), classical("gru"))
    with pytest.raises(ValueError, match="needs the whole sequence at once"):
        layer.init_state(2)


@pytest.mark.parametrize(
    "fields, message",
    [({"kind": "gro"}, "kind must be one of elman, gru, lstm, got 'gro'"), ({"width": 0}, ">= 1")],
)
def test_a_configuration_that_does_not_fit_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        CellConfig(**{"kind": "gru", "inputs": 3, "width": 4} | fields)


@pytest.mark.parametrize("kind", ["gru", "lstm", "para_gru", "para_lstm"])
def test_gates_are_noted_as_the_steps_open_them(kind):
    """A bias far from zero shuts or opens the first gate of all steps, a state of 1 no other."""
    if kind.startswith("para_"):
        config = ParaRNNConfig(cell=kind.removeprefix("para_"), inputs=5, width=4)
        layer = config.build(rngs=nnx.Rngs(0))
        layer.bias[...] = layer.bias[...].at[0].set(30.0)
        gates = 2
    else:
        layer = classical(kind)
        layer.input.bias[...] = layer.input.bias[...].at[0].set(30.0)
        gates = {"gru": 2, "lstm": 3}[kind]
    x = np.random.default_rng(0).normal(size=(2, 7, 5)).astype(np.float32)
    reset = np.arange(7)[None] == np.array([[3], [5]])

    def keep(gate):
        return {"gate": gate}

    state = layer.init_state(2) + 1
    (_, found), whole = notes.collect(layer, {"gate": keep})(x, state, reset=reset), []
    assert found["gate"]["gate"].shape[:2] == (1, gates)
    assert gate_numbers(found["gate"]["gate"])["saturated_gates"] == 1 / gates
    for t in range(7):  # the same one step at a time
        step = x[:, t : t + 1], state
        (_, state), seen = notes.collect(layer, {"gate": keep})(*step, reset=reset[:, t : t + 1])
        whole.append(seen["gate"]["gate"][0, :, :, 0])
    np.testing.assert_allclose(found["gate"]["gate"][0], np.stack(whole, axis=2), atol=1e-6)
