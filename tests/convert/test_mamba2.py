"""The table of Mamba-2: both ways with every option, and what it refuses by name."""

import dataclasses
import json

import pytest
from safetensors.numpy import load_file, save_file

from jaxrec import convert
from jaxrec.errors import UserError
from jaxrec.models.mamba2 import Mamba2Config
from tests.convert.folders import assert_loads_as, change
from tests.models import toy

CONFIG = Mamba2Config(
    vocab_size=7,
    width=8,
    layers=2,
    heads=4,
    head_width=4,
    state_size=3,
    groups=2,
    bias=True,
    conv_bias=False,
    activation="gelu_tanh",
    step_limit=(0.01, 0.5),
    tie_embeddings=False,
    residual_in_float32=False,
    norm_epsilon=1e-6,
    step_max=0.2,
)


@pytest.fixture
def folder(tmp_path):
    convert.export(toy.drawn(CONFIG), tmp_path, "mamba2")
    return tmp_path


def test_every_option_round_trips(folder):
    assert_loads_as("mamba2", folder, toy.drawn(CONFIG))


def test_an_unlimited_step_round_trips(tmp_path):
    model = toy.drawn(dataclasses.replace(CONFIG, step_limit=(0.0, float("inf"))))
    convert.export(model, tmp_path)
    assert_loads_as("mamba2", tmp_path, model)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_sise": 8}, r"unknown field hidden_sise .* Did you mean hidden_size\?"),
        ({"hidden_size": None}, r"lacks the field hidden_size"),
        ({"model_type": "mamba"}, r"model_type must be 'mamba2', got 'mamba'"),
        ({"hidden_act": "laplace"}, r"hidden_act 'laplace' is not supported"),
        ({"expand": 3}, r"must be expand times hidden_size, got 4 x 4 and 3 x 8"),
        ({"expand": "two"}, r"expand must be a count, got 'two'"),
        ({"n_groups": 3}, r"heads must be a multiple of groups"),
        ({"num_hidden_layers": 3}, r"the shape \(2, 8\), but the configuration asks for \(3, 8\)"),
        ({"tie_word_embeddings": True}, r"lm_head\.weight and backbone\.embeddings\.weight"),
    ],
)
def test_what_does_not_fit_is_named(folder, fields, message):
    change(folder, **fields)
    with pytest.raises(UserError, match=message):
        convert.load("mamba2", folder)


def test_an_inner_width_that_the_format_cannot_say_is_refused(tmp_path):
    model = toy.drawn(dataclasses.replace(CONFIG, heads=2, head_width=6))
    with pytest.raises(UserError, match="multiples of the width, got 12 and 8"):
        convert.export(model, tmp_path, "mamba2")


def test_the_layout_of_the_original_program_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, folder / "model.safetensors")
    advice = r"state-spaces/mamba.* convert_mamba2_ssm_checkpoint_to_pytorch.py of the transf"
    with pytest.raises(UserError, match=rf"has a tensor backbone.embedding.weight. .*{advice}"):
        convert.load("mamba2", folder)
    original = {
        "d_model": 8,
        "n_layer": 2,
        "vocab_size": 7,
        "ssm_cfg": {"layer": "Mamba2"},
        "rms_norm": True,
    }
    (folder / "config.json").write_text(json.dumps(original))
    with pytest.raises(UserError, match=rf"d_model .* its layers are Mamba2. .*{advice}"):
        convert.load("mamba2", folder)
