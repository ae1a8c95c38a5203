"""The table of RecurrentGemma: both ways with every option, and what it refuses by name."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrec import convert
from jaxrec.errors import UserError
from jaxrec.models.recurrentgemma import RecurrentGemmaConfig
from tests.convert.folders import assert_loads_as, change, shard
from tests.models import toy

CONFIG = RecurrentGemmaConfig(
    vocab_size=7,
    width=8,
    recurrent_width=12,
    heads=2,
    mlp_width=10,
    layers=5,
    window=3,
    context=8192,
    pattern=("recurrent", "attention"),
    kv_heads=2,
    activation="silu",
    attention_bias=True,
    rotary_base=500.0,
    rotary_fraction=1.0,
    logits_soft_cap=20.0,
    tie_embeddings=False,
)


@pytest.fixture
def folder(tmp_path):
    convert.export(toy.drawn(CONFIG), tmp_path)
    return tmp_path


def test_every_option_round_trips(folder):
    assert_loads_as("recurrentgemma", folder, toy.drawn(CONFIG))


def test_layers_go_to_their_place_in_the_pattern(folder):
    tensors, model = load_file(folder / "model.safetensors"), toy.drawn(CONFIG)
    for name, block in (
        ("model.layers.2", jax.tree.map(lambda leaf: leaf[1], model.groups.blocks[0])),
        ("model.layers.4", model.tail.blocks[0]),
    ):
        got = tensors[f"{name}.temporal_block.linear_x.weight"]
        np.testing.assert_array_equal(got.T, block.mixer.input.kernel[...])
    key_value = model.groups.blocks[1].mixer.key_value
    for place, name in enumerate("kv"):
        block = f"model.layers.3.temporal_block.{name}_proj"
        kernel = key_value.kernel[1, :, place].reshape(8, 8)
        np.testing.assert_array_equal(tensors[f"{block}.weight"].T, kernel)
        bias = key_value.bias[1, place].reshape(8)
        np.testing.assert_array_equal(tensors[f"{block}.bias"], bias)


def test_shards_are_joined_and_a_missing_one_is_named(folder):
    files = shard(folder)
    assert_loads_as("recurrentgemma", folder, toy.drawn(CONFIG))
    (folder / files[1]).unlink()
    with pytest.raises(UserError, match=rf"Cannot read .*{files[1]}"):
        convert.load("recurrentgemma", folder)


def test_rotation_of_older_files(folder):
    change(folder, rope_parameters=None, rope_theta=500.0, partial_rotary_factor=1.0)
    assert convert.load("recurrentgemma", folder).config == CONFIG


def test_what_a_file_leaves_out_is_as_the_original_takes_it(folder):
    data = json.loads((folder / "config.json").read_text())
    for name in ("lru_width", "num_key_value_heads", "rope_parameters", "block_types"):
        del data[name]
    config = convert.engine.find("recurrentgemma").read_config(data)
    assert config.recurrent_width == config.width and config.kv_heads == config.heads
    assert (config.rotary_base, config.rotary_fraction) == (10000.0, 0.5)
    assert config.pattern == ("recurrent", "recurrent", "attention")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"lru_widht": 8}, r"unknown field lru_widht .* Did you mean lru_width\?"),
        ({"intermediate_size": None}, r"lacks the field intermediate_size"),
        ({"intermediate_size": 19}, r"must be even, got 19"),
        ({"model_type": "gemma"}, r"model_type must be 'recurrent_gemma', got 'gemma'"),
        ({"hidden_activation": "laplace"}, r"hidden_activation 'laplace' is not supported"),
        ({"head_dim": 3}, r"head_dim must be 4, got 3"),
        ({"hidden_size": "8"}, r"hidden_size must be a count, got '8'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"rope_type must be 'default', got 'yarn'"),
        ({"rope_parameters": {"factor": 2}}, r"unknown field rope_parameters\.factor"),
        ({"block_types": ["recurrent", "mlp"]}, r"pattern"),
        (
            {"num_hidden_layers": 7},
            r"has no tensor model\.layers\.[56]",
        ),
        ({"num_hidden_layers": 4}, r"no place for model\.layers\.4"),
        ({"num_key_value_heads": 1}, r"k_proj.* has shape .*cannot become .*key_value"),
    ],
)
def test_what_does_not_fit_is_named(folder, fields, message):
    change(folder, **fields)
    with pytest.raises(UserError, match=message):
        convert.load("recurrentgemma", folder)
