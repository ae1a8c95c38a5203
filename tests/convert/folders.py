"""Checkpoints in a folder, for the tests that change them and for those that compare them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxrec import convert


def change(folder, **fields):
    """Changes fields of config.json; None takes one out."""
    file = folder / "config.json"
    data = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def assert_loads_as(system, folder, model):
    """The checkpoint in a folder is this model, bit for bit."""
    again = convert.load(system, folder)
    assert again.config == model.config
    for left, right in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(left, right)


def in_bfloat16(folder):
    """Rounds the tensors of a checkpoint, as most are published; returns them."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def shard(folder):
    """Cuts a checkpoint into two files with an index; returns their names."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
    return sorted(set(weight_map.values()))
