import functools
import itertools
import json
import types

import jax
import numpy as np
import pytest
import tyro
from flax import nnx

from jaxrec.cli import generate
from jaxrec.errors import UserError
from jaxrec.generation.samplers import cache_bytes
from jaxrec.models.huginn import HuginnConfig
from jaxrec.training.data import ByteTokenizer
from tests.analysis.test_wavefront import pixels

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
    """Any folder holds one small model of bytes; what its run.json says of data, to be changed."""
    data = {}

    def load_model(folder, *, step=None, ema=False):
        asked.append((str(folder), step, ema))
        run = types.SimpleNamespace(folder=folder, data=data)
        return model(), ByteTokenizer(), run, 7 if step is None else step

    monkeypatch.setattr("jaxrec.training.runs.load_model", load_model)
    return data


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


def test_the_text_ends_at_the_tokens_that_the_run_names(capsys, run_folder):
    run_folder["stop_tokens"] = list(range(CONFIG.vocab_size))
    jaxrec_generate("--json", "--prompt", "a")
    record = json.loads(capsys.readouterr().out)
    assert (record["tokens"], record["text"], record["finish"]) == (0, "", "stop token")
    run_folder["stop_tokens"] = "all"
    with pytest.raises(UserError, match=r"stop_tokens must be a list of tokens, got 'all'"):
        jaxrec_generate("--prompt", "a")


@pytest.mark.parametrize(
    "words",
    [
        ["adaptive", "--looped.exit", "kl", "--looped.exit-threshold", "0.001"],
        ["adaptive", "--looped.exit", "none", "--looped.schedule", "3", "1", "--looped.continuous"],
        ["speculative", "--looped.draft-depth", "1", "--looped.lookahead", "3"],
        ["diffusion-forcing", "--looped.max-wavefront", "4", "--looped.inner-loops", "2"],
    ],
    ids=["adaptive", "schedule", "speculative", "diffusion-forcing"],
)
def test_other_samplers_report_what_they_cost(words, capsys):
    jaxrec_generate("--prompt", "Once ", "--depth", "4", "--sampler", *words)
    shown = capsys.readouterr()
    assert shown.out.startswith("Once ")
    first, cost, plain = shown.err.splitlines()
    assert "8 tokens, " in first
    assert f"{words[0]}: " in cost and "passes of the core" in cost and "MiB" in cost
    assert f"autoregressive: 36 passes; {words[0]} is" in plain
    assert "of 8 tokens are the same" in plain
    jaxrec_generate("--json", "--prompt", "a", "--no-compare", "--depth", "4", "--sampler", *words)
    record = json.loads(capsys.readouterr().out)
    assert len(record["loops"]) == record["tokens"] == 8
    assert record["core_passes"] >= 2 and "autoregressive" not in record


def test_the_cache_is_that_of_the_schedule(capsys):
    options = ["--looped.exit", "none", "--looped.schedule", "3", "1", "--looped.continuous"]
    words = ["--prompt", "a", "--no-compare", "--depth", "4", "--sampler", "adaptive", *options]
    jaxrec_generate("--json", *words)
    record = json.loads(capsys.readouterr().out)
    begun = 1 + 1  # a prompt of one byte behind the token that begins a document
    assert record["loops"] == [3] + [1] * 7
    assert record["cache_bytes"] == cache_bytes(model(), 1, begun + 8, 3, "latest")


def test_noise_changes_the_text_and_the_seed_repeats_it(capsys):
    words = ["--json", "--no-compare", "--sampler", "adaptive", "--looped.exit", "none"]
    texts = []
    for noise in ("3", "3", "0"):
        jaxrec_generate(*words, "--looped.noise", noise, "--looped.noise-kind", "sqrt")
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != texts[2]


def test_speculation_is_the_same_text(capsys):
    options = ["--looped.draft-depth", "1", "--looped.lookahead", "3"]
    jaxrec_generate("--json", "--depth", "4", "--sampler", "speculative", *options)
    record = json.loads(capsys.readouterr().out)
    assert record["autoregressive"]["same_tokens"] == record["tokens"]
    assert record["cache"] == "full" and record["mean_loops"] == 4


def test_the_trace_is_a_picture(tmp_path, capsys):
    file = tmp_path / "wave.svg"
    options = ["--looped.max-wavefront", "4", "--looped.inner-loops", "2", "--depth", "4"]
    jaxrec_generate(
        "--json", "--sampler", "diffusion-forcing", "--no-compare", "--trace", str(file), *options
    )
    steps = (json.loads(capsys.readouterr().out)["core_passes"] - 4) // 2  # 4 read the prompt
    svg = file.read_text(encoding="utf-8")
    assert svg.startswith("<svg ")
    is_shown = np.any(pixels(svg) != 255, axis=2)  # a row for each step, a column for each position
    assert is_shown.shape[0] == steps > 1
    # The token that begins the document was read before; the window begins with the one drawn then.
    assert is_shown.any(axis=0).tolist() == [False] + [True] * (is_shown.shape[1] - 1)
    assert is_shown[0].nonzero()[0].tolist() == [1]
    for before, row in itertools.pairwise(is_shown):
        (there,) = row.nonzero()
        assert 1 <= len(there) <= 4 and there[-1] - there[0] == len(there) - 1
        assert there[0] >= before.nonzero()[0][0]


BAD = [
    (["--trace", "x.svg"], r"--trace shows the wavefront of --sampler diffusion-forcing"),
    (
        ["--sampler", "adaptive", "--looped.exit-threshold", "-0.1"],
        r"exit threshold of latent-diff must be > 0",
    ),
    (["--sampler", "adaptive", "--looped.cache", "most"], r"Unknown cache strategy 'most'"),
    (["--sampler", "adaptive", "--depth", "0"], r"depth must be >= 1, got 0"),
    (["--sampler", "speculative", "--looped.draft-depth", "0"], r"depth must be >= 1, got 0"),
    (["--sampler", "diffusion-forcing", "--looped.headway", "0"], r"headway must be >= 1"),
    (
        ["--sampler", "diffusion-forcing", "--prompt", "x" * 40, "--looped.no-full-prefill"],
        r"a prompt of 41 tokens is larger than the window of 32",
    ),
    (
        ["--sampler", "diffusion-forcing", "--looped.max-wavefront", "129"],
        r"--looped\.max-wavefront 129 is larger than the context of 128 tokens",
    ),
    (
        ["--sampler", "diffusion-forcing", "--prompt", "x" * 100, "--tokens", "40"],
        r"101 tokens and 40 new ones is longer than the context of 128 tokens",
    ),
    (
        ["--sampler", "diffusion-forcing", "--prompt", "x", "--prompt", "x" * 200],
        r"prompt 1 has 201 tokens and is longer than the context",
    ),
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
