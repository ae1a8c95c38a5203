"""The table of HRM: both ways with every option, and what it refuses by name."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrec import convert
from jaxrec.errors import UserError
from jaxrec.models.hrm import HRMConfig
from tests.convert.folders import assert_loads_as, change
from tests.models import toy

CONFIG = HRMConfig(
    vocab_size=5,
    length=6,
    width=8,
    heads=2,
    puzzles=3,
    puzzle_width=12,
    high_layers=1,
    low_layers=2,
    expansion=3.0,
    high_cycles=3,
    low_cycles=1,
    max_segments=4,
    exploration=0.3,
    positions="learned",
    rotary_base=500.0,
    normaliser="softmax",
    norm_epsilon=1e-4,
)
PREFIX = "_orig_mod.model.inner."
EMBEDDING = f"{PREFIX}embed_tokens.embedding_weight"


@pytest.fixture
def folder(tmp_path):
    convert.export(toy.drawn(CONFIG), tmp_path, "hrm")
    return tmp_path


def replace(folder, **tensors):
    """Changes tensors by their name behind the prefix, with __ for dots; None takes one out."""
    file = folder / "model.safetensors"
    changed = {PREFIX + name.replace("__", "."): value for name, value in tensors.items()}
    kept = load_file(file) | changed
    save_file({name: value for name, value in kept.items() if value is not None}, file)


@pytest.mark.parametrize(
    "options",
    [{}, {"positions": "rotary", "normaliser": "stablemax"}, {"puzzle_width": 0}],
    ids=str,
)
def test_every_option_round_trips(tmp_path, options):
    model = toy.drawn(dataclasses.replace(CONFIG, **options))
    convert.export(model, tmp_path, "hrm")
    assert_loads_as("hrm", tmp_path, model)


def test_what_the_original_may_leave_out(tmp_path):
    config = dataclasses.replace(CONFIG, puzzle_width=0, rotary_base=1e4, norm_epsilon=1e-5)
    model = toy.drawn(config)
    convert.export(model, tmp_path, "hrm")
    change(tmp_path, puzzle_emb_ndim=None, rope_theta=None, rms_norm_eps=None)
    assert_loads_as("hrm", tmp_path, model)


def test_the_loss_may_be_described_by_itself(folder):
    """As in the original's all_config.yaml."""
    loss = {"name": "losses@ACTLossHead", "loss_type": "softmax_cross_entropy"}
    change(folder, loss_type=None, loss=loss, name="hrm.hrm_act_v1@HierarchicalReasoningModel")
    assert_loads_as("hrm", folder, toy.drawn(CONFIG))


def test_a_bfloat16_checkpoint_loads_value_by_value(folder):
    tensors = load_file(folder / "model.safetensors")
    short = {name: np.asarray(jnp.asarray(x, jnp.bfloat16)) for name, x in tensors.items()}
    save_file(short, folder / "model.safetensors")
    loaded = convert.engine.to_tensors(convert.engine.find("hrm"), convert.load("hrm", folder))
    assert loaded.keys() == tensors.keys()
    for name, value in loaded.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, short[name].astype(np.float32), err_msg=name)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"H_cycle": 2}, r"unknown field H_cycle .* Did you mean H_cycles\?"),
        ({"H_cycles": None}, r"lacks the field H_cycles"),
        ({"num_heads": 3}, r"heads"),
        ({"pos_encodings": "sine"}, r"pos_encodings must be of rope, learned, got 'sine'"),
        ({"loss_type": "hinge"}, r"loss_type must be of stablemax_cross_entropy, .* got 'hinge'"),
        ({"loss_type": ["softmax"]}, r"loss_type must be of stablemax_cross_entropy"),
        ({"loss": {"loss_type": "hinge"}}, r"is 'softmax_cross_entropy', but 'hinge' within loss"),
        ({"loss": {"kind": 1}}, r"loss must hold name and loss_type and nothing else"),
        ({"loss": "softmax"}, r"loss must hold name and loss_type"),
        ({"L_layers": 3}, r"the shape \(2, .*, but the configuration asks for \(3, "),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_is_named(folder, fields, message):
    change(folder, **fields)
    with pytest.raises(UserError, match=message):
        convert.load("hrm", folder)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"q_head__bias": None}, r"the checkpoint has no tensor _orig_mod.*q_head\.bias"),
        ({"H_step": np.ones(3)}, r"the model has no place for _orig_mod.model.inner.H_step"),
        ({"H_init": np.ones(9)}, r"H_init gives high_start the shape \(9,\), but .* \(8,\)"),
        ({"lm_head__weight": np.ones((5, 9))}, r"head/table the shape \(5, 9\)"),
        ({"q_head__weight": np.ones((8, 2))}, r"q_head\.weight has shape \(8, 2\)"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_are_named(folder, tensors, message):
    replace(folder, **tensors)
    with pytest.raises(UserError, match=message):
        convert.load("hrm", folder)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_the_originals_own_files_are_not_read_and_the_message_tells_how(folder, missing):
    (folder / missing).unlink()
    (folder / "all_config.yaml").write_text("arch: {}")
    (folder / "step_100").write_bytes(b"a pickle")
    with pytest.raises(UserError, match=r"step_N, a pickle, .*torch\.load\('step_N'.*config\.json"):
        convert.load("hrm", folder)


def test_a_gradient_that_the_format_cannot_say_is_refused(tmp_path):
    model = toy.drawn(dataclasses.replace(CONFIG, low_cycles=2, low_backprop=2))
    with pytest.raises(UserError, match="this model's through 1 and 2"):
        convert.export(model, tmp_path, "hrm")


def test_the_configuration_is_written_in_the_originals_words(folder):
    data = json.loads((folder / "config.json").read_text())
    assert (data["pos_encodings"], data["loss_type"]) == ("learned", "softmax_cross_entropy")
    assert (data["puzzle_emb_ndim"], data["H_layers"], data["halt_max_steps"]) == (12, 1, 4)
