"""The table of xLSTM: both ways with every option, and what it refuses by name."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrec import convert
from jaxrec.errors import UserError
from jaxrec.models import xlstm
from jaxrec.models.xlstm import XLSTMConfig
from tests.convert.folders import assert_loads_as, change
from tests.models import toy

CONFIG = XLSTMConfig(
    vocab_size=7,
    width=8,
    layers=2,
    heads=2,
    key_width=6,
    value_width=10,
    mlp_width=11,
    bias=True,
    gate_soft_cap=2.0,
    logits_soft_cap=5.0,
    norm_epsilon=1e-5,
    epsilon=1e-4,
    chunk=16,
)


@pytest.fixture
def folder(tmp_path):
    convert.export(toy.drawn(CONFIG), tmp_path, "xlstm")
    return tmp_path


def read(**fields):
    return convert.engine.find("xlstm").read_config(fields)


@pytest.mark.parametrize("weight_mode", ["single", "fused"])
@pytest.mark.parametrize("bias", [True, False])
def test_every_option_round_trips(tmp_path, weight_mode, bias):
    model = toy.drawn(dataclasses.replace(CONFIG, weight_mode=weight_mode, bias=bias))
    convert.export(model, tmp_path, "xlstm")
    assert_loads_as("xlstm", tmp_path, model)


def test_no_soft_caps_are_null_and_not_the_defaults(tmp_path):
    model = toy.drawn(dataclasses.replace(CONFIG, gate_soft_cap=None, logits_soft_cap=None))
    convert.export(model, tmp_path, "xlstm")
    assert_loads_as("xlstm", tmp_path, model)


def test_fused_projections_lie_one_below_the_other(tmp_path):
    model = toy.drawn(dataclasses.replace(CONFIG, weight_mode="fused"))
    convert.export(model, tmp_path, "xlstm")
    tensors = load_file(tmp_path / "model.safetensors")
    mixer, mlp = model.blocks.mixer, model.blocks.mlp
    name = "backbone.blocks.1.{}"
    together = tensors[name.format("mlstm_layer.qkv_opreact.weight")]
    assert together.shape == (6 + 6 + 10 + 10, 8)
    np.testing.assert_array_equal(together[6:12].T, mixer.key.kernel[1].reshape(8, 6))
    np.testing.assert_array_equal(together[22:].T, mixer.output_gate.kernel[1])
    gates = tensors[name.format("mlstm_layer.ifgate_preact.bias")]
    np.testing.assert_array_equal(gates[:2], mixer.input_gate.bias[1])
    np.testing.assert_array_equal(gates[2:], mixer.forget_gate.bias[1])
    up = tensors[name.format("ffn.proj_up_gate_z.weight")]
    np.testing.assert_array_equal(up[11:].T, mlp.up.kernel[1])


def test_the_published_file():
    """Fields left out, and the inner width rounded up from 10924.03."""
    assert read(embedding_dim=4096, num_blocks=32) == xlstm.XLSTM_7B
    assert read(hidden_size=4096, model_type="xlstm") == xlstm.XLSTM_7B
    assert read(num_blocks=3, num_hidden_layers=32).layers == 3


@pytest.mark.parametrize("multiple, inner", [(1, 21), (8, 24), (64, 64)])
def test_the_inner_width_is_rounded_up(multiple, inner):
    sizes = {"hidden_size": 8, "num_heads": 2, "ffn_proj_factor": 2.667}
    assert read(**sizes, ffn_round_up_to_multiple_of=multiple).mlp_width == inner


@pytest.mark.parametrize("width", [49, 98, 768, 4096])
def test_every_size_can_be_said_as_a_factor(width):
    write = convert.engine.find("xlstm").write_config
    for size in range(1, 2 * width, 7):
        config = dataclasses.replace(
            CONFIG, width=width, heads=1, key_width=size, value_width=size, mlp_width=size
        )
        assert read(**write(config)) == config


def test_what_the_original_does_not_read_changes_nothing(folder):
    change(folder, add_out_norm=False, tie_word_embeddings=True, chunkwise_kernel="other")
    assert_loads_as("xlstm", folder, toy.drawn(CONFIG))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_sise": 8}, r"unknown field hidden_sise .* Did you mean hidden_size\?"),
        ({"model_type": "lstm"}, r"model_type must be 'xlstm', got 'lstm'"),
        ({"embedding_dim": 16}, r"embedding_dim must be 8, got 16"),
        ({"qk_dim_factor": "half"}, r"qk_dim_factor must be a positive number, got 'half'"),
        ({"ffn_round_up_to_multiple_of": 0}, r"ffn_round_up_to_multiple_of must be a count"),
        ({"weight_mode": "double"}, r"weight_mode must be one of single, fused"),
        ({"num_heads": 4}, r"key_width must be a multiple of heads, got 6 and 4"),
        ({"num_blocks": 3}, r"the shape \(2, 8\), but the configuration asks for \(3, 8\)"),
    ],
)
def test_what_does_not_fit_is_named(folder, fields, message):
    change(folder, **fields)
    with pytest.raises(UserError, match=message):
        convert.load("xlstm", folder)


def test_a_projection_of_another_shape_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "backbone.blocks.0.mlstm_layer.q.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"mlstm_layer\.q\.weight has shape \(8, 6\), which cannot"):
        convert.load("xlstm", folder)
