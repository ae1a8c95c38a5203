"""The table of the RG-LRU alone: both ways, and what it refuses."""

import jax
import pytest
from flax import nnx

from jaxrec import convert
from jaxrec.convert.engine import read_tensors
from jaxrec.errors import UserError
from jaxrec.layers.rglru import RGLRUConfig
from tests.convert.folders import assert_loads_as, change


def build():
    config = RGLRUConfig(width=6, heads=2)
    return jax.jit(lambda key: config.build(rngs=nnx.Rngs(key)))(jax.random.key(0))


def test_the_table_goes_both_ways(tmp_path):
    layer = build()
    convert.export(layer, tmp_path)
    shapes = {name: tensor.shape for name, tensor in read_tensors(tmp_path).items()}
    gates = {f"{gate}.{part}" for gate in ("a_gate", "input_gate") for part in "wb"}
    assert shapes.keys() == {"a_param", *gates} and shapes["a_gate.w"] == (2, 3, 3)
    assert_loads_as("rglru", tmp_path, layer)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_head": 2}, r"unknown field num_head in config.json. Did you mean num_heads"),
        ({"width": None}, r"rglru: config.json lacks the field width"),
        ({"num_heads": 4}, r"width must be a multiple of heads, got 6 and 4"),
        ({"width": 8}, r"a_param gives decay the shape \(6,\), but .* asks for \(8,\)"),
    ],
)
def test_what_does_not_fit_is_named(fields, message, tmp_path):
    convert.export(build(), tmp_path)
    change(tmp_path, **fields)
    with pytest.raises(UserError, match=message):
        convert.load("rglru", tmp_path)
