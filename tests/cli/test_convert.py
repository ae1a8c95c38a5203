"""`jaxrec convert` there and back, and what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrec import convert
from jaxrec.cli.main import main
from jaxrec.layers.s5 import S5Config
from tests.training.small import HUGINN


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint in the original's layout."""
    folder = tmp_path_factory.mktemp("published") / "huginn"
    config = dataclasses.replace(HUGINN, vocab_size=260)
    convert.export(jax.jit(lambda: config.build(rngs=nnx.Rngs(3)))(), folder)
    return folder


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    """A layer in its original's layout."""
    folder = tmp_path_factory.mktemp("published") / "s5"
    config = S5Config(width=2, state=2)
    convert.export(jax.jit(lambda: config.build(rngs=nnx.Rngs(0)))(), folder)
    return folder


def test_a_checkpoint_becomes_a_run_and_a_checkpoint_again(capsys, published, tmp_path):
    run, back = tmp_path / "run", tmp_path / "back"
    assert main(["convert", "huginn", str(published), str(run)]) == 0
    assert "jaxrec generate" in capsys.readouterr().out
    assert main(["generate", str(run), "--prompt", "ab", "--tokens", "3"]) == 0
    assert main(["convert", "huginn", str(run), str(back), "--export"]) == 0
    there, here = (convert.engine.read_tensors(folder) for folder in (published, back))
    assert there.keys() == here.keys()
    for name, tensor in there.items():
        np.testing.assert_array_equal(here[name], tensor, err_msg=name)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["hugin", "{published}", "{new}"], "Did you mean huginn?"),
        (["huginn", "{new}", "{new}"], "config.json"),
        (["huginn", "{published}", "{full}"], "not empty"),
        (["huginn", "{published}", "{file}"], "note.txt"),
        (["huginn", "{full}", "{new}", "--export"], "no run.json"),
        (["s5", "{layer}", "{new}"], "s5 is a layer and not a language model"),
    ],
)
def test_what_cannot_be_converted(capsys, published, layer, tmp_path, words, says):
    file = tmp_path / "full" / "note.txt"
    file.parent.mkdir()
    file.write_text("here first")
    places = {"published": published, "layer": layer, "new": tmp_path / "new"}
    places |= {"full": file.parent, "file": file}
    assert main(["convert", *(word.format(**places) for word in words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not (tmp_path / "new").exists()
