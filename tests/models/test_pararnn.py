"""The ParaRNN language model: its size, start, options and bad input."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrec.config import from_dict, to_dict
from jaxrec.layers.scan import Solver
from jaxrec.models import pararnn
from jaxrec.models.pararnn import ParaRNNLMConfig
from tests import references
from tests.models import toy
from tests.models.toy import run

SMALLEST = ParaRNNLMConfig(vocab_size=13, width=16, layers=2, heads=2, mlp_width=24)
TOLERANCE = 5e-6  # ten times the gap between the plain loop in float32 and in float64, 5e-7
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 9), dtype=np.int32)


@pytest.mark.parametrize(
    "name, parameters", [("PARAGRU_1B", 1_274_185_752), ("PARALSTM_1B", 1_274_284_056)]
)
def test_numbers_of_parameters_that_the_source_says(name, parameters):
    assert toy.parameters(getattr(pararnn, name)) == parameters


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_number_of_parameters(cell):
    d, f = 16, 24
    recurrent = 3 * d + (2 * d if cell == "lstm" else 0)
    cell_size = recurrent + 3 * d * d // 2 + 3 * d
    block = 3 * d + 2 * d * d + 5 * d + cell_size + d * d + 1 + 3 * d * f
    config = dataclasses.replace(SMALLEST, cell=cell)
    assert toy.parameters(config) == 13 * d + d + 2 * block


def test_initialisation():
    blocks = toy.initialised(pararnn.TINY_LSTM).blocks
    for entries in (blocks.cell.recurrent[...], blocks.cell.peephole[...]):
        assert np.std(entries) == pytest.approx(128**-0.5, rel=0.1)
    assert np.max(np.abs(blocks.cell.kernel[...])) <= (3 / 32) ** 0.5
    assert not np.any(blocks.cell.bias[...])
    np.testing.assert_array_equal(blocks.residual_scale[...], 1)


@pytest.mark.parametrize(
    "options",
    [
        {"cell": "lstm", "conv_width": 2, "recurrent_limit": None},
        {"mlp_residual": False, "norm_epsilon": 1e-3, "recurrent_limit": 0.1},
        {"solver": Solver(method="quasi_elk", variance=100.0, clip=0.9, relaxation=0.9)},
    ],
)
def test_every_option_equals_the_loop(options):
    options = {"solver": Solver(method="newton", window=4)} | options
    config = dataclasses.replace(SMALLEST, **options)
    model = toy.drawn(config)
    params = jax.device_get(nnx.to_pure_dict(nnx.split(model)[1]))
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    want = references.pararnn(wide, TOKENS, np.zeros(TOKENS.shape, bool), config)
    np.testing.assert_allclose(run(model, TOKENS)[0], want, atol=TOLERANCE)


def test_the_configuration_holds_a_solver():
    config = dataclasses.replace(SMALLEST, solver=Solver(method="newton", max_iters=4))
    assert from_dict(ParaRNNLMConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layers": 0}, "layers must be >= 1, got 0"),
        ({"conv_width": 1}, "conv_width must be >= 2, got 1"),
        ({"heads": 3}, "width must be a multiple of heads, got 16 and 3"),
        ({"cell": "rnn"}, "cell must be one of gru, lstm"),
        ({"recurrent_limit": -1.0}, "recurrent_limit must be > 0, got -1.0"),
        ({"recurrent_scale": 0.0}, "recurrent_scale must be > 0, got 0.0"),
    ],
)
def test_what_does_not_fit_is_named(fields, message):
    with pytest.raises(ValueError, match=f"ParaRNNLMConfig: {message}"):
        dataclasses.replace(SMALLEST, **fields)
