import functools
import json
import sys
import types

import jax
import pytest
import tyro
from flax import nnx

from jaxrec.cli import generate
from jaxrec.errors import UserError
from jaxrec.models.huginn import HuginnConfig
from jaxrec.training.data import ByteTokenizer

CONFIG = HuginnConfig(
    vocab_size=272,
    width=8,
    heads=2,
    mlp_width=8,
    prelude_layers=1,
    core_layers=1,
    coda_layers=1,
    context=128,
    mean_depth=2,
    backprop_depth=1,
)
asked = []


@functools.cache
def model():
    return jax.jit(lambda: CONFIG.build(rngs=nnx.Rngs(0)))()


@pytest.fixture(autouse=True)
def run_folder(monkeypatch):
    """Any folder holds one small model of bytes."""

    def load_model(folder, *, step=None, ema=False):
        asked.append((str(folder), step, ema))
        return model(), ByteTokenizer(), None, 7 if step is None else step

    runs = types.ModuleType("jaxrec.training.runs")
    runs.load_model = load_model
    monkeypatch.setitem(sys.modules, "jaxrec.training.runs", runs)


def jaxrec_generate(*words):
    arguments = tyro.cli(generate.Arguments, args=["runs/a", "--tokens", "8", *words])
    return generate.run(arguments)


def test_one_prompt_is_printed_with_its_continuation(capsys):
    assert jaxrec_generate("--prompt", "Once ") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("Once ") and shown.out.endswith("\n")
    assert "8 tokens, " in shown.err and "tokens/s, the first after" in shown.err
    jaxrec_generate("--prompt", "Once ")
    assert capsys.readouterr().out == shown.out  # the same seed
    jaxrec_generate("--prompt", "Once ", "--seed", "1")
    assert capsys.readouterr().out != shown.out


def test_several_prompts_are_printed_each_with_its_text(capsys):
    jaxrec_generate("--prompt", "one", "--prompt", "two")
    out = capsys.readouterr().out
    assert out.startswith("--- one\n") and "\n--- two\n" in out


def test_json_has_one_object_per_prompt(capsys, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("né", encoding="utf-8")
    jaxrec_generate("--json", "--prompt", "one", "--prompt-file", str(file), "--depth", "2")
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["prompt"] for record in records] == ["one", "né"]
    for record in records:
        assert record["finish"] in ("length", "stop token", "stop string")
        assert record["tokens"] <= 8 and record["seed"] == 0 and record["step"] == 7


def test_without_a_prompt_a_document_begins(capsys):
    jaxrec_generate("--json", "--step", "5", "--ema")
    assert json.loads(capsys.readouterr().out)["prompt"] == ""
    assert asked[-1] == ("runs/a", 5, True)


def test_stop_strings_end_the_text(capsys):
    jaxrec_generate("--json", "--prompt", "a")
    text = json.loads(capsys.readouterr().out)["text"]
    jaxrec_generate("--json", "--prompt", "a", "--stop", "never", "--stop", text[2])
    record = json.loads(capsys.readouterr().out)
    assert record["text"] == text.partition(text[2])[0]
    assert record["finish"] == "stop string"


BAD = [
    (["--temperature", "-1"], r"temperature must be >= 0"),
    (["--top-p", "2"], r"top_p must be in \(0, 1\], got 2.0"),
    (["--tokens", "0"], r"max_new_tokens must be >= 1, got 0"),
    (["--depth", "0"], r"depth must be >= 1, got 0"),
    (["--prompt", "x" * 200], r"the prompt has 201 tokens and is longer than the context"),
    (["--prompt-file", "no/such/file"], r"--prompt-file no/such/file: No such file or directory"),
    (["--stop", ""], r"A stop string is empty"),
]


@pytest.mark.parametrize("words, message", BAD)
def test_bad_input_is_one_line(words, message):
    with pytest.raises(UserError, match=message) as error:
        jaxrec_generate(*words)
    assert "\n" not in str(error.value)


def test_a_prompt_file_must_be_text(tmp_path):
    file = tmp_path / "prompt.bin"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"prompt\.bin: not UTF-8 text\. Expected a text file"):
        jaxrec_generate("--prompt-file", str(file))
