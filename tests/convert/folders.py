"""Checkpoints in a folder, for the tests that change them and for those that compare them."""

import json

import jax
import numpy as np

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
