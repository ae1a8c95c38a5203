"""The table of pLSTM: every kind of module there and back, and what it refuses."""

import dataclasses
import json

import pytest

from jaxrec import convert
from jaxrec.errors import UserError
from jaxrec.layers.plstm import PLSTMConfig, PLSTMGridConfig
from jaxrec.layers.plstm_gates import (
    GateConfig,
    ProjectionConfig,
    TransitionConfig,
    TransitionLayerConfig,
)
from jaxrec.models.plstm import lm_config
from jaxrec.models.plstm_vision import vision_config
from tests.convert.folders import assert_loads_as, change
from tests.models import toy

LM = lm_config(vocab_size=13, width=8, layers=2, heads=2)
VISION = vision_config(width=16, heads=2, layers=2, patch=2, grid=(3, 4), classes=5)
GRID = PLSTMGridConfig(width=8, heads=2, key_width=3, value_width=4, conv_width=(3, 2))
TRANSITION = TransitionLayerConfig(
    width=8, heads=2, tracked=2, options=TransitionConfig(weight=False)
)
CONFIGS = {
    "lm": LM,
    "tied lm": dataclasses.replace(LM, tie_embeddings=True, context=64),
    "vision": VISION,
    "vision without positions": dataclasses.replace(VISION, position=False, drop=0.1),
    "grid": GRID,
    "grid of mode D": dataclasses.replace(
        GRID, mode="D", chirality="R", skip=True, out_bias=True, norm="layer", norm_bias=True
    ),
    "grid as the original turns it": dataclasses.replace(
        GRID, fused=False, flips="original", orientations=(0, 1, 2, 3), jt=2
    ),
    "sequence": PLSTMConfig(
        width=8,
        heads=2,
        key_width=4,
        value_width=1,
        conv_width=None,
        tie_query_key=True,
        out=False,
        skip=False,
        value=ProjectionConfig(sub_heads=2, bias=False, normalised=True),
        transition=TransitionConfig(symmetric=True),
        direct=GateConfig(weight=False, activation="tanh", activation_scale=2.0, bias_init=-6.0),
    ),
    "transition": TRANSITION,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_exported_loads_as_the_same(name, tmp_path):
    model = toy.drawn(CONFIGS[name])
    convert.export(model, tmp_path)
    assert_loads_as("plstm", tmp_path, model)


def test_corrected_flips_are_those_orientations_with_which_the_original_has_them(tmp_path):
    corrected = dataclasses.replace(GRID, fused=False)
    convert.export(toy.drawn(corrected), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["orientation_combinations"] == [0, 1, 4, 5]
    assert convert.load("plstm", tmp_path).config.directions == corrected.directions


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder of each of two models."""
    folders = {}
    for name in ("lm", "vision"):
        folders[name] = tmp_path_factory.mktemp(name)
        convert.export(toy.drawn(CONFIGS[name]), folders[name])
    return folders


def read(folder, **fields):
    data = json.loads((folder / "config.json").read_text()) | fields
    return convert.engine.find("plstm").read_config(data)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("lm", {"vocab": 3}, "unknown field vocab in config.json. Did you mean vocab_size"),
        ("lm", {"_shortname": "pLSTMGraph"}, "config.json describes 'pLSTMGraph'"),
        ("lm", {"embedding_dim": 16}, "input_dim must be 16, got 8"),
        ("lm", {"num_blocks": 3}, "num_blocks must be 3, got 2"),
        ("vision", {"pooling": "cls"}, "pooling cls puts a token in front"),
        ("vision", {"pooling": "max"}, "pooling must be one of corners, mean, sum, center"),
        ("vision", {"stride": 1}, "stride must be 2, got 1"),
        ("vision", {"mode": "features"}, "mode must be 'classifier', got 'features'"),
        ("vision", {"norm": {"class_name": "Identity"}}, "class_name must be of RMSNorm"),
        (
            "vision",
            {"norm": {"class_name": "RMSNorm", "scale": False}},
            "scale must be True, got False",
        ),
    ],
)
def test_what_it_does_not_know_is_refused_by_name(exported, name, fields, message):
    with pytest.raises(UserError, match=message):
        read(exported[name], **fields)


def test_fields_deep_inside_are_refused_by_name(exported):
    data = json.loads((exported["lm"] / "config.json").read_text())
    mixer = data["block_stack"]["block"]["interaction_module"]
    mixer["source"]["activation"] = "relu"
    with pytest.raises(UserError, match=r"block\.mixer\.source\.activation must be one of"):
        read(exported["lm"], block_stack=data["block_stack"])
    mixer["source"] |= {"activation": "tanh", "JT": 3}
    with pytest.raises(UserError, match="source: JT must be 4, got 3"):
        read(exported["lm"], block_stack=data["block_stack"])
    mixer["source"] |= {"JT": 4, "temperature": 1.0}
    with pytest.raises(UserError, match="source: unknown field temperature"):
        read(exported["lm"], block_stack=data["block_stack"])
    del mixer["source"]
    with pytest.raises(UserError, match="lacks the field source"):
        read(exported["lm"], block_stack=data["block_stack"])


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    convert.export(toy.drawn(VISION), tmp_path)
    change(tmp_path, output_shape=[7])
    with pytest.raises(UserError, match=r"head\.weight has shape|head\.weight gives"):
        convert.load("plstm", tmp_path)


def test_a_model_without_a_cap_has_no_original(tmp_path):
    with pytest.raises(UserError, match="no language model without a soft cap"):
        convert.export(toy.drawn(dataclasses.replace(LM, logits_soft_cap=None)), tmp_path)
