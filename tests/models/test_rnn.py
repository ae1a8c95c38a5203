"""Language models of classical cells: their sizes, options and bad input."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.scan import Solver
from jaxrec.models import rnn
from jaxrec.models.rnn import RNNConfig
from tests import references
from tests.models import toy
from tests.models.toy import run

SMALLEST = RNNConfig(vocab_size=13, width=16, layers=2, mlp_width=24)
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 9), dtype=np.int32)
TOLERANCE = 5e-6  # ten times the gap between the plain loop in float32 and in float64, 5e-7


def test_numbers_of_parameters():
    d, f = 128, 320
    rest = 272 * d + d + 4 * (2 * d + 3 * d * f)
    assert toy.parameters(rnn.TINY_GRU) == rest + 4 * (6 * d * d + 4 * d)
    assert toy.parameters(rnn.TINY_SLSTM) == rest + 4 * (4 * d * d + 4 * d * d // 4 + 4 * d)


@pytest.mark.parametrize(
    "options",
    [
        {"cell": "elman"},
        {"cell": "lstm", "solver": Solver(method="newton", window=4)},
        {"cell": "slstm", "heads": 2, "norm_epsilon": 1e-3},
        {"cell": "slstm", "heads": 2, "solver": Solver(method="newton")},
    ],
    ids=["elman", "lstm newton", "slstm", "slstm newton"],
)
def test_every_option_equals_the_loop(options):
    config = dataclasses.replace(SMALLEST, **options)
    model = toy.drawn(config)
    params = jax.device_get(nnx.to_pure_dict(nnx.split(model)[1]))
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    want = references.rnn(wide, TOKENS, np.zeros(TOKENS.shape, bool), config)
    np.testing.assert_allclose(run(model, TOKENS)[0], want, atol=TOLERANCE)


@pytest.mark.parametrize("cell", ["gru", "slstm"])
def test_it_says_of_itself_what_it_can(cell):
    model = toy.drawn(dataclasses.replace(SMALLEST, cell=cell))
    found = jax.jit(lambda model: model.measure(TOKENS))(model)
    if cell == "slstm":
        assert found == {}
        return
    entries = model.blocks.mixer
    largest = np.max(np.abs(entries.recurrent[...]))
    np.testing.assert_allclose(
        found["max_recurrent"], max(largest, np.max(np.abs(entries.candidate_bias[...])))
    )
    assert 1 <= found["newton_iterations"] <= 5
    assert found["lyapunov"] < 0


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"cell": "gro"}, "cell must be one of elman, gru, lstm, slstm, got 'gro'"),
        ({"heads": 2}, "only the slstm has heads, got 2 of a gru"),
        ({"heads": 3, "cell": "slstm"}, "width must be a multiple of heads, got 16 and 3"),
        ({"layers": 0}, "layers must be >= 1, got 0"),
    ],
)
def test_what_does_not_fit_is_named(fields, message):
    with pytest.raises(ValueError, match=f"RNNConfig: {message}"):
        dataclasses.replace(SMALLEST, **fields)
