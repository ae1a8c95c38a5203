"""The table of Mamba: both ways with every option, and what it refuses by name."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrec import convert
from jaxrec.errors import UserError
from jaxrec.models.mamba import MambaConfig
from tests.convert.folders import assert_loads_as, change
from tests.models import toy

CONFIG = MambaConfig(
    vocab_size=7,
    width=8,
    layers=2,
    inner_width=16,
    step_rank=3,
    state_size=4,
    bias=True,
    conv_bias=False,
    activation="gelu_tanh",
    tie_embeddings=False,
    residual_in_float32=False,
    norm_epsilon=1e-6,
    step_init="constant",
    step_max=0.2,
)


@pytest.fixture
def folder(tmp_path):
    convert.export(toy.drawn(CONFIG), tmp_path, "mamba")
    return tmp_path


def test_every_option_round_trips(folder):
    assert_loads_as("mamba", folder, toy.drawn(CONFIG))


def test_the_first_tap_of_the_file_is_the_oldest_input(folder):
    tensor = load_file(folder / "model.safetensors")["backbone.layers.1.mixer.conv1d.weight"]
    assert tensor.shape == (16, 1, 4)
    kernel = toy.drawn(CONFIG).blocks.mixer.conv_kernel[1]
    np.testing.assert_array_equal(tensor[:, 0, 0], kernel[0])


@pytest.mark.parametrize("width, rank", [(8, 1), (24, 2)])
def test_a_rank_may_be_left_to_the_width(folder, width, rank):
    data = json.loads((folder / "config.json").read_text())
    config = convert.engine.find("mamba").read_config(
        data | {"time_step_rank": "auto", "hidden_size": width}
    )
    assert config.step_rank == rank and config.inner_width == 2 * width


def test_fields_of_older_files_are_known(folder):
    change(folder, d_model=8, n_layer=2, d_inner=16, ssm_cfg={}, rms_norm=True, torch_dtype="x")
    assert convert.load("mamba", folder).config == CONFIG


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_sise": 8}, r"unknown field hidden_sise .* Did you mean hidden_size\?"),
        ({"hidden_size": None}, r"lacks the field hidden_size"),
        ({"model_type": "mamba2"}, r"model_type must be 'mamba', got 'mamba2'"),
        ({"hidden_act": "laplace"}, r"hidden_act 'laplace' is not supported.* Known: silu, swish"),
        ({"intermediate_size": 17}, r"intermediate_size must be 16, got 17"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, r"ssm_cfg must be \{\}"),
        ({"rms_norm": False}, r"rms_norm must be True, got False"),
        ({"state_size": "many"}, r"state_size"),
        ({"expand": "two"}, r"expand and hidden_size must be positive numbers, got \('two', 8\)"),
        ({"time_step_init_scheme": "zeros"}, r"step_init"),
        ({"num_hidden_layers": 3}, r"the shape \(2, 8\), but the configuration asks for \(3, 8\)"),
    ],
)
def test_what_does_not_fit_is_named(folder, fields, message):
    change(folder, **fields)
    with pytest.raises(UserError, match=message):
        convert.load("mamba", folder)


def test_a_repeated_head_must_be_the_embedding(tmp_path):
    model = toy.drawn(dataclasses.replace(CONFIG, tie_embeddings=True))
    convert.export(model, tmp_path, "mamba")
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    again = convert.load("mamba", tmp_path)
    np.testing.assert_array_equal(again.embedding.table[...], model.embedding.table[...])
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"lm_head\.weight and backbone\.embeddings\.weight must be the same"
    ):
        convert.load("mamba", tmp_path)


def test_an_inner_width_that_the_format_cannot_say_is_refused(tmp_path):
    model = toy.drawn(dataclasses.replace(CONFIG, inner_width=12))
    with pytest.raises(UserError, match="multiples of the width, got 12 and 8"):
        convert.export(model, tmp_path, "mamba")


def test_the_layout_of_the_original_program_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, folder / "model.safetensors")
    advice = r"state-spaces/mamba.* convert_mamba_ssm_checkpoint_to_pytorch.py of the transf"
    with pytest.raises(UserError, match=rf"has a tensor backbone.embedding.weight. .*{advice}"):
        convert.load("mamba", folder)
    original = {"d_model": 8, "n_layer": 2, "vocab_size": 7, "ssm_cfg": {}, "rms_norm": True}
    (folder / "config.json").write_text(json.dumps(original))
    with pytest.raises(UserError, match=rf"d_model .* its layers are Mamba1. .*{advice}"):
        convert.load("mamba", folder)
