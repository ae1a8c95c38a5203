"""The table of RWKV-4: both ways with every option, and what it refuses by name."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrec import convert
from jaxrec.errors import UserError
from jaxrec.models.rwkv import RWKVConfig
from tests.convert.folders import assert_loads_as, change
from tests.models import toy

CONFIG = RWKVConfig(
    vocab_size=7,
    width=8,
    layers=2,
    inner_width=6,
    mlp_width=10,
    norm_epsilon=1e-6,
    context=64,
    rescale_every=3,
)


@pytest.fixture
def folder(tmp_path):
    convert.export(toy.drawn(CONFIG), tmp_path, "rwkv")
    return tmp_path


def read(folder, **fields):
    data = json.loads((folder / "config.json").read_text()) | fields
    known = {name: value for name, value in data.items() if value is not None}
    return convert.engine.find("rwkv").read_config(known)


def test_every_option_round_trips(folder):
    assert_loads_as("rwkv", folder, toy.drawn(CONFIG))


def test_blends_are_stored_with_axes_of_batch_and_time(folder):
    tensors = load_file(folder / "model.safetensors")
    assert tensors["rwkv.blocks.1.attention.time_mix_key"].shape == (1, 1, 8)
    assert "rwkv.blocks.1.pre_ln.weight" not in tensors


def test_sizes_may_be_left_to_the_width(folder):
    config = read(folder, attention_hidden_size=None, intermediate_size=None, hidden_size=24)
    assert (config.width, config.inner_width, config.mlp_width) == (24, 24, 96)


@pytest.mark.parametrize("given, ours", [(0, 0), (-1, 0), (1, 1), (None, 6)])
def test_rescaling_is_read_and_never_is_zero(folder, given, ours):
    assert read(folder, rescale_every=given).rescale_every == ours


def test_the_context_has_two_names(folder):
    assert read(folder, context_length=None, max_position_embeddings=32).context == 32
    with pytest.raises(UserError, match="max_position_embeddings must be 64, got 32"):
        read(folder, max_position_embeddings=32)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_sise": 8}, r"unknown field hidden_sise .* Did you mean hidden_size\?"),
        ({"model_type": "rwkv5"}, r"model_type must be 'rwkv', got 'rwkv5'"),
        ({"hidden_size": "wide"}, r"hidden_size must be a count, got 'wide'"),
        ({"rescale_every": "often"}, r"rescale_every must be a number of layers, got 'often'"),
        ({"attention_hidden_size": 0}, r"inner_width must be >= 1, got 0"),
        ({"num_hidden_layers": 3}, r"the shape \(2, 8\), but the configuration asks for \(3, 8\)"),
    ],
)
def test_what_does_not_fit_is_named(folder, fields, message):
    change(folder, **fields)
    with pytest.raises(UserError, match=message):
        convert.load("rwkv", folder)


def test_a_blend_of_another_rank_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "rwkv.blocks.0.attention.time_mix_key"
    tensors[name] = np.ascontiguousarray(tensors[name][0])
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"time_mix_key has shape \(1, 8\), which cannot become"):
        convert.load("rwkv", folder)


def test_a_repeated_head_must_be_the_embedding(tmp_path):
    model = toy.drawn(dataclasses.replace(CONFIG, tie_embeddings=True))
    convert.export(model, tmp_path, "rwkv")
    tensors = load_file(tmp_path / "model.safetensors")
    assert "head.weight" not in tensors
    tensors["head.weight"] = tensors["rwkv.embeddings.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert convert.load("rwkv", tmp_path).config == model.config
    tensors["head.weight"] = tensors["head.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"head\.weight and rwkv\.embeddings\.weight must be the"):
        convert.load("rwkv", tmp_path)


def test_the_layout_of_the_original_program_is_named(folder):
    tensors = {"emb.weight": np.ones((7, 8)), "blocks.0.att.key.weight": np.ones((6, 8))}
    save_file(tensors, folder / "model.safetensors")
    message = r"a tensor emb.weight. .*BlinkDL/RWKV-LM.* convert_rwkv_checkpoint_to_hf.py of the"
    with pytest.raises(UserError, match=message):
        convert.load("rwkv", folder)
    (folder / "config.json").unlink()  # which the original does not write
    with pytest.raises(UserError, match=message):
        convert.load("rwkv", folder)
