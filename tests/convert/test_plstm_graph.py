"""The table of graph layers both ways for every kind, and what it refuses."""

import json

import jax
import pytest
from flax import nnx

from jaxrec import convert
from jaxrec.convert.engine import read_tensors
from jaxrec.errors import UserError
from jaxrec.layers.plstm_graph import PLSTMGraphConfig
from tests.convert.folders import assert_loads_as, change

SIZES = {"width": 6, "heads": 2, "key_width": 2, "value_width": 3, "ends": "far"}


def build(**options):
    config = PLSTMGraphConfig(**SIZES | options)
    return jax.jit(lambda key: config.build(rngs=nnx.Rngs(key)))(jax.random.key(0))


@pytest.mark.parametrize(
    "options, tensors",
    [
        ({"max_edges": 3}, {"transition.weight": (18, 6), "mhnorm.scale": (2, 3)}),
        ({"max_edges": 1, "bias": True, "norm_bias": True}, {"out.bias": (6,), "key.bias": (4,)}),
        ({"max_edges": 2, "out": False, "mode": "D"}, {"source.weight": (4, 6)}),
        ({"edge_width": 5, "bias": True}, {"transition.weight": (2, 16), "mark.weight": (2, 11)}),
        ({"edge_width": 5, "bias": True, "norm_scale": False}, {"mark.bias": (2,)}),
    ],
    ids=str,
)
def test_the_table_goes_both_ways(options, tensors, tmp_path):
    layer = build(**options)
    convert.export(layer, tmp_path)
    exported = read_tensors(tmp_path)
    assert {name: exported[name].shape for name in tensors} == tensors
    assert_loads_as("plstm_graph", tmp_path, layer)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"class_name": "pLSTM1DLayer"}, "class_name must be one of pLSTMGraphLayer, .* 'pLSTM1D"),
        ({"num_head": 2}, "unknown field num_head in config.json. Did you mean num_heads"),
        ({"max_edges": None}, "lacks the field max_edges"),
        ({"max_edges": 4}, r"source.weight has shape \(6, 6\), which cannot become"),
        ({"mode": "PD"}, "mode must be one of P, D"),
        ({"mhnorm": None}, "lacks the field mhnorm"),
        ({"mhnorm": 3}, "mhnorm must be a mapping of fields, got 3"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(fields, message, tmp_path):
    convert.export(build(max_edges=3), tmp_path)
    change(tmp_path, **fields)
    with pytest.raises(UserError, match=message):
        convert.load("plstm_graph", tmp_path)


def test_another_norm_is_refused(tmp_path):
    convert.export(build(max_edges=3), tmp_path)
    norm = json.loads((tmp_path / "config.json").read_text())["mhnorm"]
    change(tmp_path, mhnorm=norm | {"class_name": "MultiHeadLayerNorm"})
    with pytest.raises(UserError, match="mhnorm: class_name must be 'MultiHeadRMSNorm'"):
        convert.load("plstm_graph", tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_edges": 3, "ends": "near"}, "gates edges by their far ends"),
        ({"edge_width": 3}, "always has biases"),
    ],
)
def test_what_the_original_cannot_compute_is_not_written(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        convert.export(build(**options), tmp_path)
