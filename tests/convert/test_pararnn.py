"""The tables of ParaRNN and of DEER's GRU: both ways with every option, and what they refuse."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrec import convert
from jaxrec.errors import UserError
from jaxrec.layers.cells import CellConfig
from jaxrec.layers.pararnn import ParaRNNConfig
from jaxrec.models.pararnn import ParaRNNLMConfig
from tests.convert.folders import assert_loads_as, change
from tests.models import toy

GRU = ParaRNNConfig(inputs=6, width=4, heads=2, nonlinearities=("half_sigmoid", "sigmoid", "elu"))
LSTM = ParaRNNConfig(
    cell="lstm", inputs=6, width=4, nonlinearities=("sigmoid", "exp", "gelu_tanh", "tanh")
)
LM = ParaRNNLMConfig(
    vocab_size=7,
    width=8,
    layers=2,
    heads=2,
    mlp_width=256,
    cell="lstm",
    conv_width=3,
    mlp_residual=False,
    recurrent_limit=None,
    norm_epsilon=1e-5,
)


@pytest.mark.parametrize("config", [GRU, LSTM, LM], ids=["gru", "lstm", "lm"])
def test_every_option_round_trips(config, tmp_path):
    convert.export(toy.drawn(config), tmp_path, "pararnn")
    assert_loads_as("pararnn", tmp_path, toy.drawn(config))
    assert convert.load("pararnn", tmp_path).config == config


def test_mixers_and_mlps_take_turns(tmp_path):
    convert.export(toy.drawn(LM), tmp_path, "pararnn")
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["blocks.2.rnn_cell.C"].shape == (2, 8)
    assert tensors["blocks.3.1.w2.weight"].shape == (8, 256)
    assert tensors["blocks.0.conv.conv.weight"].shape == (8, 1, 3)
    tensors["lm_head.weight"] = tensors["embedding.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight and embedding\.weight must be the same"):
        convert.load("pararnn", tmp_path)


def test_nonlinearities_may_be_left_out(tmp_path):
    convert.export(toy.drawn(GRU), tmp_path, "pararnn")
    data = json.loads((tmp_path / "config.json").read_text())
    kept = {name: value for name, value in data.items() if not name.startswith("nonlin")}
    config = convert.engine.find("pararnn").read_config(kept)
    assert config.nonlinearities == ("sigmoid", "sigmoid", "tanh")


@pytest.mark.parametrize(
    "config, fields, message",
    [
        (GRU, {"cell": "GRU"}, "cell must be one of GRUDiagMH, LSTMCIFGDiagMH, got 'GRU'"),
        (GRU, {"nonlin_reset": "sigmod"}, r"nonlin_reset must be one of .* Did you mean sigmoid\?"),
        (GRU, {"nonlin_f": "tanh"}, "unknown field nonlin_f"),
        (GRU, {"num_heads": 3}, "width must be a multiple of heads, got 4 and 3"),
        (LM, {"model": 3}, "model must be a mapping of fields, got 3"),
        (LM, {"conv_width": 3}, r"unknown field conv_width"),
        (LM, {"rms_eps": "small"}, "norm_epsilon"),
    ],
)
def test_what_does_not_fit_is_named(config, fields, message, tmp_path):
    convert.export(toy.drawn(config), tmp_path, "pararnn")
    change(tmp_path, **fields)
    with pytest.raises(UserError, match=message):
        convert.load("pararnn", tmp_path)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"recurrent_limit": 0.5}, "the original has no recurrent_limit, got 0.5"),
        ({"mlp_residual": True}, "no residual connection and 256 inner channels"),
        ({"mlp_width": 24}, "256 inner channels, got mlp_residual=False and mlp_width=24"),
    ],
)
def test_what_the_original_has_not_is_not_written(fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        convert.export(toy.drawn(dataclasses.replace(LM, **fields)), tmp_path, "pararnn")


def test_the_gru_of_deer(tmp_path):
    config = CellConfig(kind="gru", inputs=3, width=4)
    convert.export(toy.drawn(config), tmp_path, "deer_elk")
    assert_loads_as("deer_elk", tmp_path, toy.drawn(config))
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: x.shape for name, x in tensors.items()} == {
        "weight_ih": (12, 3),
        "weight_hh": (12, 4),
        "bias": (12,),
        "bias_n": (4,),
    }
    np.testing.assert_array_equal(tensors["weight_hh"][4:8].T, toy.drawn(config).recurrent[:, 1])
    change(tmp_path, hidden_sise=3)
    with pytest.raises(UserError, match=r"unknown field hidden_sise .* Did you mean hidden_size"):
        convert.load("deer_elk", tmp_path)


def test_other_cells_are_not_written_as_deers(tmp_path):
    config = CellConfig(kind="lstm", inputs=3, width=4)
    with pytest.raises(UserError, match="deer_elk: only GRUs can be written, got an lstm"):
        convert.export(toy.drawn(config), tmp_path, "deer_elk")
