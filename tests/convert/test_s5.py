"""S5's table both ways for every form its C takes, and what it refuses."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrec import convert
from jaxrec.convert.engine import read_tensors
from jaxrec.errors import UserError
from jaxrec.layers.s5 import S5Config


def build(**options):
    config = S5Config(width=3, state=4, **options)
    return jax.jit(lambda key: config.build(rngs=nnx.Rngs(key)))(jax.random.key(0))


@pytest.mark.parametrize(
    "options, outputs",
    [
        ({}, {"C": (3, 4, 2)}),
        ({"output_init": "complex_normal", "conj_sym": False}, {"C": (3, 4, 2)}),
        ({"bidirectional": True}, {"C1": (3, 4, 2), "C2": (3, 4, 2)}),
        ({"bidirectional": True, "output_init": "complex_normal"}, {"C": (3, 8, 2)}),
    ],
    ids=str,
)
def test_the_table_goes_both_ways(options, outputs, tmp_path):
    layer = build(**options)
    convert.export(layer, tmp_path)
    tensors = read_tensors(tmp_path)
    assert {name: tensors[name].shape for name in tensors if name.startswith("C")} == outputs
    again = convert.load("s5", tmp_path)
    assert again.config == layer.config
    for left, right in zip(jax.tree.leaves(again), jax.tree.leaves(layer), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"conj_symm": True}, r"s5: unknown field conj_symm in config.json. Did you mean conj_sym"),
        ({"H": None}, r"s5: config.json lacks the field H"),
        ({"discretization": "foh"}, r"s5: config.json: .*discretization"),
        ({"P": 5}, r"s5: .* the configuration asks for"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(change, message, tmp_path):
    convert.export(build(), tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | change
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(UserError, match=message):
        convert.load("s5", tmp_path)
