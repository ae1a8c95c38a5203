"""`jaxrec convert` there and back, and what it refuses."""

import dataclasses
import json
import shlex
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxrec import convert
from jaxrec.cli.main import main
from jaxrec.convert.huginn import END_TEXT, END_TURN
from jaxrec.layers.s5 import S5Config
from jaxrec.models.mamba import MambaConfig
from jaxrec.models.recurrentgemma import RecurrentGemmaConfig
from jaxrec.training.runs import load_model, read_run
from tests.convert.folders import change, in_bfloat16, shard
from tests.models import toy
from tests.training.small import HUGINN, write_text
from tests.training.test_data_tokenizers import train_tokenizer

CONFIGS = {
    "huginn": dataclasses.replace(HUGINN, vocab_size=260),
    "recurrentgemma": RecurrentGemmaConfig(
        vocab_size=260,
        width=16,
        recurrent_width=16,
        heads=2,
        mlp_width=24,
        layers=3,
        window=8,
        context=8192,
    ),
    "mamba": MambaConfig(
        vocab_size=260, width=16, layers=2, inner_width=32, step_rank=2, state_size=4
    ),
}
SLOW = dict.fromkeys(("mamba", "recurrentgemma"), pytest.mark.slow)  # as Huginn, once more
systems = pytest.mark.parametrize(
    "system", [pytest.param(name, marks=SLOW.get(name, ())) for name in CONFIGS]
)


def publish(system, folder):
    """A checkpoint in the original's layout."""
    config = CONFIGS[system]
    convert.export(jax.jit(lambda: config.build(rngs=nnx.Rngs(3)))(), folder, system)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return publish("huginn", tmp_path_factory.mktemp("published") / "huginn")


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    """A layer in its original's layout."""
    folder = tmp_path_factory.mktemp("published") / "s5"
    config = S5Config(width=2, state=2)
    convert.export(jax.jit(lambda: config.build(rngs=nnx.Rngs(0)))(), folder)
    return folder


@systems
def test_a_checkpoint_becomes_a_run_and_a_checkpoint_again(capsys, system, tmp_path):
    """In several files there; generated from, evaluated, trained on; and back."""
    published = publish(system, tmp_path / "published")
    tensors = convert.engine.read_tensors(published)
    shard(published)
    run, back = tmp_path / "converted", tmp_path / "back"
    assert main(["convert", system, str(published), str(run)]) == 0
    assert "jaxrec generate" in capsys.readouterr().out
    assert main(["generate", str(run), "--prompt", "ab", "--tokens", "3"]) == 0
    assert main(["convert", system, str(run), str(back), "--export"]) == 0
    exported = convert.engine.read_tensors(back)
    assert exported.keys() == tensors.keys()
    for name, tensor in exported.items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)

    text, runs = write_text(tmp_path / "text"), tmp_path / "runs"
    options = ["--data", str(text), "--data.valid-fraction", "0.2", "--runs", str(runs)]
    options += ["--batch", "2", "--time", "16", "--eval-batches", "1", "--eval-depths", "1"]
    options += ["--optimizer.ema-decay", "0.9"]
    capsys.readouterr()
    assert main(["train", str(run), "--steps", "2", *options]) == 0
    said = capsys.readouterr().out
    (go_on,) = [line for line in said.splitlines() if line.startswith("Go on:")]
    before, after = (load_model(folder) for folder in (run, runs / "converted-on"))
    assert after.run.model_config == before.run.model_config
    drift = jax.tree.map(lambda a, b: float(abs(a - b).max()), before.model, after.model)
    moved = max(jax.tree.leaves(drift))
    assert 0 < moved < 0.02  # two steps of Adam at the beginning of the warm-up, not other weights
    words = shlex.split(go_on.partition("train ")[2])
    assert main(["train", *words]) == 0  # the printed command goes on with the new run
    assert load_model(runs / "converted-on").step == 4
    capsys.readouterr()
    assert main(["eval", str(runs / "converted-on"), "--json"]) == 0
    assert "bits_per_byte" in capsys.readouterr().out


@pytest.fixture
def raven(tmp_path):
    """A checkpoint as Huginn's is published: bfloat16, the whole vocabulary, a tokenizer beside it.
    Whatever it reads, one of the two tokens follows that end a text or a turn."""
    config = dataclasses.replace(
        HUGINN, vocab_size=65536, width=8, context=16, tie_embeddings=False
    )
    folder = tmp_path / "raven"
    convert.export(toy.drawn(config), folder)
    tensors = load_file(folder / "model.safetensors")
    head = np.zeros_like(tensors["lm_head.weight"])
    head[END_TEXT] = np.linspace(-1, 1, 8)
    head[END_TURN] = -head[END_TEXT]
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    in_bfloat16(folder)
    train_tokenizer(folder / "tokenizer.json", special=())
    (folder / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    return folder


def test_a_published_folder_is_used_with_its_tokenizer_and_its_ends(capsys, raven, tmp_path):
    run, back = tmp_path / "run", tmp_path / "back"
    assert main(["convert", "huginn", str(raven), str(run)]) == 0
    names = ("tokenizer.json", "tokenizer_config.json")
    capsys.readouterr()
    words = ["--prompt", "return x", "--tokens", "3", "--depth", "1", "--temperature", "0"]
    assert main(["generate", str(run), *words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["tokens"], record["finish"]) == (0, "stop token")

    text = write_text(tmp_path / "text")
    words = ["--data", str(text), "--batches", "1", "--depths", "1", "--json"]
    assert main(["eval", str(run), *words]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] > 0

    assert main(["convert", "huginn", str(run), str(back), "--export", "--dtype", "bfloat16"]) == 0
    for name in names:
        assert (back / name).read_bytes() == (raven / name).read_bytes()
    tensors, exported = (convert.engine.read_tensors(folder) for folder in (raven, back))
    assert exported.keys() == tensors.keys()
    for name, tensor in exported.items():
        assert tensor.dtype.name == "bfloat16"
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)


def test_the_files_beside_a_checkpoint_say_where_its_texts_end(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "published")
    change(folder, eos_token_id=7)
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 7, 10000]}')
    assert main(["convert", "huginn", str(folder), str(tmp_path / "run")]) == 0
    assert read_run(tmp_path / "run").data["stop_tokens"] == [7, 9]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["hugin", "{published}", "{new}"], "Did you mean huginn?"),
        (["huginn", "{new}", "{new}"], "config.json"),
        (["huginn", "{published}", "{full}"], "not empty"),
        (["huginn", "{published}", "{file}"], "note.txt"),
        (["huginn", "{full}", "{new}", "--export"], "no run.json"),
        (["s5", "{layer}", "{new}"], "holds S5, which is not a language model or a solver"),
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
