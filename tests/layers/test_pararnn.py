"""ParaRNN cells: their start, options and limits; the recurrences are in the laws and goldens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.pararnn import ParaRNNConfig
from jaxrec.layers.scan import Solver
from tests import references

GRU = ParaRNNConfig(inputs=8, width=6, heads=2)
LSTM = dataclasses.replace(GRU, cell="lstm")
cells = pytest.mark.parametrize("config", [GRU, LSTM], ids=["gru", "lstm"])


def build(config, seed=0):
    return config.build(rngs=nnx.Rngs(seed))


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@cells
def test_initialisation(config):
    wide = dataclasses.replace(config, inputs=64, width=256)
    layer = build(wide)
    recurrent = [layer.recurrent[...], *([] if config is GRU else [layer.peephole[...]])]
    for entries in recurrent:
        assert np.std(entries) == pytest.approx(2 / (5 * 256) ** 0.5, rel=0.1)
    fan_out = 256 if config is GRU else 128
    limit = (6 / (32 + fan_out)) ** 0.5
    assert 0.99 * limit < np.max(np.abs(layer.kernel[...])) <= limit
    np.testing.assert_allclose(layer.bias[0], -np.linspace(0, 1, 256), atol=1e-6)
    assert not np.any(layer.bias[1:])
    other = dataclasses.replace(
        wide, recurrent_init="cut_normal", input_init="kaiming", bias_init="zero", width=4
    )
    layer = build(other)
    assert np.max(np.abs(layer.recurrent[...])) <= 0.9
    limit = (3 / 32) ** 0.5
    assert 0.9 * limit < np.max(np.abs(layer.kernel[...])) <= limit
    assert not np.any(layer.bias[...])


@cells
def test_recurrent_entries_are_limited(config):
    limited = build(dataclasses.replace(config, recurrent_limit=0.2))
    layer = build(config)
    x = draw(2, 5, 8)
    run = jax.jit(lambda layer, x: layer(x, layer.init_state(2))[0])
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(layer)[1]))
    state = np.zeros((2, 6) if config is GRU else (2, 2, 6), np.float32)
    want, _ = references.para_cell(params, x, state, np.zeros((2, 5), bool), limit=0.2)
    np.testing.assert_allclose(run(limited, x), want, atol=1e-6)
    assert np.max(np.abs(run(layer, x) - want)) > 1e-3
    gradient = jax.grad(lambda layer: jnp.sum(layer(x, layer.init_state(2))[0] ** 2))(limited)
    outside = np.abs(limited.recurrent[...]) > 0.2
    assert np.all((gradient.recurrent[...] == 0) == outside)


@pytest.mark.parametrize(
    "config, names",
    [
        (GRU, ("half_sigmoid", "sigmoid", "elu")),
        (LSTM, ("sigmoid", "exp", "gelu_tanh", "identity")),
    ],
    ids=["gru", "lstm"],
)
def test_nonlinearities_can_be_chosen(config, names):
    x = draw(1, 8, 8)
    layer = build(dataclasses.replace(config, nonlinearities=names, recurrent_limit=0.1))
    outputs = []
    for method in ("newton", "sequential"):
        layer.solver = Solver(method=method)
        outputs.append(jax.jit(lambda layer, x: layer(x, layer.init_state(1))[0])(layer, x))
    np.testing.assert_allclose(*outputs, atol=1e-5)
    plain, _ = build(config)(x, layer.init_state(1))
    assert np.max(np.abs(plain - outputs[0])) > 1e-2


def test_three_iterations_solve_what_is_limited():
    """The paper makes three iterations and looks at no residual; a fourth settles the rest."""
    config = ParaRNNConfig(inputs=16, width=16, recurrent_limit=0.5)
    layer = build(config)
    layer.recurrent[...] = jnp.asarray(draw(3, 16))
    layer.solver = Solver(method="newton", max_iters=4)
    run = jax.jit(lambda layer, x: layer.solve(layer.inputs(x), layer.init_state(2))[1])
    info = run(layer, draw(2, 512, 16))
    assert info.converged
    assert info.iterations <= 4


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"cell": "rnn"}, "cell must be one of gru, lstm, got 'rnn'"),
        ({"heads": 4}, "width must be a multiple of heads, got 6 and 4"),
        ({"nonlinearities": ("tanh",)}, "those of update, reset, candidate, got"),
        ({"nonlinearities": ("tanh", "tahn", "relu")}, "no 'tahn'. Did you mean tanh?"),
        ({"recurrent_limit": 0.0}, "recurrent_limit must be > 0, got 0.0"),
        ({"recurrent_scale": -2.0}, "recurrent_scale must be > 0, got -2.0"),
        ({"input_init": "kaming"}, "input_init must be one of xavier, kaiming"),
    ],
)
def test_what_does_not_fit_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GRU, **fields)


def test_a_solver_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="Solver: window must be >= 1, got 0"):
        Solver(window=0)
