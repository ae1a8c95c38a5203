"""The conversion engine in both directions, and everything it refuses."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxrec import convert
from jaxrec.convert import engine
from jaxrec.errors import UserError
from jaxrec.models import linear_rnn
from jaxrec.models.huginn import HuginnConfig
from tests.convert.folders import assert_loads_as, change

CONFIG = HuginnConfig(
    vocab_size=7,
    width=8,
    heads=2,
    mlp_width=12,
    prelude_layers=1,
    core_layers=2,
    coda_layers=1,
    context=16,
    mean_depth=2,
    backprop_depth=2,
    adapter_bias=True,
    tie_embeddings=False,
)
FC = "transformer.core_block.1.mlp.fc.weight"


@pytest.fixture(scope="module")
def model():
    """Every number different, so that none can be taken for another."""
    graph, state = nnx.split(nnx.eval_shape(lambda: CONFIG.build(rngs=nnx.Rngs(0))))
    leaves, structure = jax.tree.flatten(nnx.to_pure_dict(state))
    begin = np.cumsum([0, *(leaf.size for leaf in leaves)])
    numbers = [
        np.arange(at, at + leaf.size, dtype=np.float32).reshape(leaf.shape)
        for at, leaf in zip(begin, leaves, strict=False)
    ]
    return nnx.merge(graph, jax.tree.unflatten(structure, numbers))


@pytest.fixture
def folder(model, tmp_path):
    """An exported checkpoint to spoil."""
    convert.export(model, tmp_path)
    return tmp_path


def spoil(folder, change):
    """Rewrites the tensors after a change of their dict."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


# Both directions


def test_a_model_round_trips(model, folder):
    assert_loads_as("huginn", folder, model)


def test_layers_are_transposed_and_stacked(model, folder):
    tensors = load_file(folder / "model.safetensors")
    gate, up = np.split(tensors[FC], 2)
    np.testing.assert_array_equal(gate.T, model.core.mlp.gate.kernel[1])
    np.testing.assert_array_equal(up.T, model.core.mlp.up.kernel[1])
    latent, given = np.split(tensors["transformer.adapter.weight"], 2, axis=1)
    np.testing.assert_array_equal(latent.T, model.adapter_latent.kernel[...])
    np.testing.assert_array_equal(given.T, model.adapter_input.kernel[...])


def test_exported_tensors_are_contiguous(model):
    """The writer stores a transposed view with the right shape and the wrong order."""
    tensors = engine.to_tensors(engine.find("huginn"), model)
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())


def test_a_model_is_not_written_as_another(model, tmp_path):
    with pytest.raises(UserError, match="is one of huginn; it cannot be written as mamba"):
        convert.export(model, tmp_path / "out", "mamba")
    assert not (tmp_path / "out").exists()


def test_a_tree_shaped_like_the_model_is_exported_by_the_same_table(model):
    doubled = jax.tree.map(lambda leaf: 2 * leaf, model)
    table = engine.find("huginn")
    plain, twice = engine.to_tensors(table, model), engine.to_tensors(table, model, doubled)
    np.testing.assert_array_equal(twice[FC], 2 * plain[FC])


def shard(folder, *, index=True):
    """Cuts the checkpoint into two files."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
    return weight_map


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_joined(model, folder, index):
    shard(folder, index=index)
    assert_same(convert.load("huginn", folder), model)


def test_what_is_larger_than_a_shard_is_written_in_several(model, tmp_path):
    convert.export(model, tmp_path, shard_bytes=900)
    files = sorted(tmp_path.glob("*.safetensors"))
    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert [file.name for file in files] == names and len(files) > 2
    sizes = [[tensor.nbytes for tensor in load_file(file).values()] for file in files]
    assert all(sum(each) <= 900 or len(each) == 1 for each in sizes)
    assert any(len(each) > 1 for each in sizes)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    for file in files:
        assert {n for n, where in index["weight_map"].items() if where == file.name} == {
            *load_file(file)
        }
    assert_loads_as("huginn", tmp_path, model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numbers_are_rounded_on_the_way_out_and_widened_on_the_way_in(model, tmp_path, dtype):
    thirds = jax.tree.map(lambda x: x / 3, model)
    convert.export(thirds, tmp_path, dtype=dtype)
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds == {"BF16" if dtype == "bfloat16" else "F16"}
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), thirds)
    assert_same(convert.load("huginn", tmp_path), rounded)
    assert np.any(rounded.embedding.table[...] != thirds.embedding.table[...])


def test_another_dtype_is_refused(model, tmp_path):
    with pytest.raises(UserError, match=r"is of float32, bfloat16, float16, got dtype 'int8'"):
        convert.export(model, tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()


def test_only_the_files_of_the_index_are_read(model, folder):
    shard(folder)
    save_file({"stray": np.zeros(1, np.float32)}, folder / "other.safetensors")
    assert_same(convert.load("huginn", folder), model)


# Refusals


def test_an_unknown_system_is_named(model, tmp_path):
    with pytest.raises(
        UserError, match=r"no conversion for 'hugin'\. Did you mean huginn\? Known:"
    ):
        convert.load("hugin", tmp_path)
    other = nnx.eval_shape(lambda: linear_rnn.TINY.build(rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match=r"no conversion for 'linear_rnn'"):
        convert.export(other, tmp_path)


def test_nothing_is_overwritten(model, folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"model\.safetensors exists; choose another directory"):
        convert.export(model, folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"Cannot read .*nowhere/config\.json"):
        convert.load("huginn", tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no \.safetensors file"):
        convert.load("huginn", folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_never_read(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(
        UserError, match=rf"{name}, which is a pickle .*safetensors\.torch\.save_file"
    ):
        convert.load("huginn", folder)


def test_a_missing_shard_is_named(folder):
    files = sorted(set(shard(folder).values()))
    (folder / files[1]).unlink()
    with pytest.raises(UserError, match=rf"Cannot read .*{files[1]}"):
        convert.load("huginn", folder)


@pytest.mark.parametrize("escape", ["../model.safetensors", "/etc/model.safetensors", "a/b"])
def test_an_index_cannot_lead_out_of_the_folder(folder, escape):
    text = json.dumps({"weight_map": {"x": escape}})
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"files must lie in that folder"):
        convert.load("huginn", folder)


def test_a_tensor_in_two_files_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({FC: tensors[FC]}, folder / "more.safetensors")
    with pytest.raises(UserError, match=rf"more\.safetensors holds {FC} again"):
        convert.load("huginn", folder)


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_truncated_file_is_named(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=rf"Cannot read {file}"):
        convert.load("huginn", folder)


def test_a_missing_tensor_is_named(folder):
    spoil(folder, lambda tensors: tensors.pop("transformer.core_block.0.norm_2.weight"))
    with pytest.raises(UserError, match=r"no tensor transformer\.core_block\.0\.norm_2\.weight"):
        convert.load("huginn", folder)


def test_a_missing_last_layer_is_named(folder):
    def drop(tensors):
        for name in [name for name in tensors if name.startswith("transformer.core_block.1.")]:
            del tensors[name]

    spoil(folder, drop)
    with pytest.raises(UserError, match=r"core_block\.\{i\}.* gives core/.* the shape \(1, 8\)"):
        convert.load("huginn", folder)


def test_unused_tensors_are_named(folder):
    def add(tensors):
        tensors |= {f"extra.{i}": np.zeros(1, np.float32) for i in range(7)}

    spoil(folder, add)
    with pytest.raises(UserError, match=r"no place for extra\.0, .*extra\.4 and 2 more"):
        convert.load("huginn", folder)


def test_tables_of_cosines_are_ignored(model, folder):
    spoil(folder, lambda tensors: tensors.update(freqs_cis=np.zeros(3, np.float32)))
    assert_same(convert.load("huginn", folder), model)


@pytest.mark.parametrize(
    "name, change, message",
    [
        (FC, lambda x: x[:-1], rf"{FC} has shape \(23, 8\), which cannot become .*gate/kernel"),
        (FC, lambda x: x[:, :-1], rf"{FC} has shape \(24, 7\), which cannot become"),
        (
            "transformer.ln_f.weight",
            lambda x: x[:-1],
            r"transformer\.ln_f\.weight gives norm/scale the shape \(7,\), .* asks for \(8,\)",
        ),
        (
            "lm_head.weight",
            lambda x: x.T,
            r"lm_head\.weight gives head/table the shape \(8, 7\), .* asks for \(7, 8\)",
        ),
        (
            "transformer.adapter.weight",
            lambda x: np.ascontiguousarray(x.T),
            r"transformer\.adapter\.weight",
        ),
        (
            "transformer.coda.0.attn.proj.weight",
            lambda x: x.reshape(4, 16),
            r"transformer\.coda\.0\.attn\.proj\.weight",
        ),
    ],
)
def test_misshapen_tensors_are_named(folder, name, change, message):
    def misshape(tensors):
        tensors[name] = np.ascontiguousarray(change(tensors[name]))

    spoil(folder, misshape)
    with pytest.raises(UserError, match=message):
        convert.load("huginn", folder)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_embed": 8}, r"unknown field n_embed in config\.json\. Did you mean n_embd\?"),
        ({"n_embd": None}, r"lacks the field n_embd"),
        ({"nonlin_name": "ReLU"}, r"nonlin_name must be 'SiLU', got 'ReLU'"),
        ({"state_init": "zero"}, r"state_init must be 'like-init', got 'zero'"),
        ({"test_time_noise": 0.1}, r"test_time_noise must be 0, got 0\.1"),
        ({"num_key_value_heads": 1}, r"num_key_value_heads must be 2, got 1"),
        ({"n_heads": 3}, r"num_attention_heads must be 3, got 2"),
        ({"mean_recurrence": 0}, r"config\.json: .*mean_depth must be >= 1, got 0"),
        (
            {"tie_embeddings": True},
            r"lm_head\.weight and transformer\.wte\.weight must be the same",
        ),
        ({"n_layers_in_coda": 2}, r"transformer\.coda\.\{i\}"),
    ],
)
def test_configurations_that_do_not_fit_are_named(folder, fields, message):
    change(folder, **fields)
    with pytest.raises(UserError, match=message):
        convert.load("huginn", folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"padding_multiple": 4},  # of a published file; the tables have as many rows as it says
        {"vocab_size": 5, "padded_vocab_size": 7},
        {"_note": "anything"},
    ],
)
def test_rows_of_the_vocabulary_are_counted_as_the_original_does(model, folder, fields):
    change(folder, **fields)
    assert_same(convert.load("huginn", folder), model)


@pytest.mark.parametrize("text", ["[1]", "{", "\x00"])
def test_a_config_that_is_no_json_object_is_named(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        convert.load("huginn", folder)
