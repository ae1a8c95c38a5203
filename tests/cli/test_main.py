"""What a user meets at the command line: one line and status 2 for anything wrong, and nothing
lost."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest

from jaxrec.cli import list_systems
from jaxrec.cli.main import COMMANDS, main, program
from jaxrec.cli.train import command_line, parse
from jaxrec.models import huginn, linear_rnn
from jaxrec.training.loop import train
from tests.training.commands import PATIENCE, started, train_words, wait_for_lines
from tests.training.small import HUGINN, LINEAR_RNN, model_options, run_config, write_text

MODEL = "jaxrec.models.linear_rnn:TINY"
SIZES = ["--batch", "8", "--time", "16", "--eval-batches", "1", "--eval-every", "0"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """The folder of a finished run of the looped model."""
    runs = tmp_path_factory.mktemp("runs")
    train("jaxrec.models.huginn:TINY", HUGINN, run_config(text, steps=2), runs=runs)
    return runs / "run"


def refused(capsys, *argv) -> str:
    """Runs a command that must fail; returns its one line."""
    assert main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("jaxrec: ")
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["trian"], "Did you mean train?"),
        (["train", "jaxrec.models.hugin:TINY"], "Did you mean jaxrec.models.huginn?"),
        (["train", "jaxrec.models.huginn:TINNY"], "Did you mean TINY?"),
        (["train", "jaxrec.models.huginn"], "package.module:NAME"),
        (["train", ".models:TINY"], "full name"),
        (
            ["train", "jaxrec.models.huginn:HuginnConfig"],
            "not the configuration of a language model",
        ),
        (["train", MODEL, "--model.widht", "16"], "--model.width"),
        (["train", MODEL, "--model.width", "wide"], "wide"),
        (["train", MODEL, "--stesp", "3"], "--steps"),
        (["train", MODEL, "--steps", "0"], "steps must be at least 1; got 0"),
        (["train", MODEL, "--model.heads", "5"], "multiple of heads"),
        (["train", MODEL, "--batch", "9", "--accumulate", "2"], "batch is 9"),
        (["train", MODEL, "--optimizer.name", "sgd"], "adamw"),
        (["train", "--steps", "3"], "MODEL comes first"),
        (["generate"], "Run folder"),
        (["generate", "no/such/run"], "no run.json"),
        (["eval", "no/such/run"], "no run.json"),
        (["eval", "no/such/run", "--depths", "1,x"], "loop counts"),
    ],
)
def test_a_wrong_word_is_answered_with_the_right_one(capsys, argv, says):
    assert says in refused(capsys, *argv)


def test_data_that_cannot_be_used(capsys, tmp_path):
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("a few words")
    start = ["train", MODEL, *SIZES, "--runs", tmp_path / "runs"]
    assert "empty" in refused(capsys, *start, "--data", empty)
    assert "tokens" in refused(capsys, *start, "--data", short)
    assert "missing.txt" in refused(capsys, *start, "--data", tmp_path / "missing.txt")
    assert "Did you mean python-docs?" in refused(capsys, *start, "--data", "python-dosc")
    assert not (tmp_path / "runs").exists()


def test_sizes_that_do_not_fit_each_other(capsys, text, tmp_path):
    start = ["train", MODEL, *SIZES, "--data", text, "--runs", tmp_path / "runs"]
    assert "needs 16 devices and there are 8" in refused(capsys, *start, "--mesh", "data=16")
    assert "Did you mean model?" in refused(capsys, *start, "--mesh", "modle=2")
    assert "do not divide by" in refused(capsys, *start, "--batch", "4", "--mesh", "data=8")
    assert "mlp" in refused(capsys, *start, "--mesh", "model=2", "--model.mlp-width", "101")
    assert "context 1024" in refused(capsys, *start, "--time", "2048")
    assert "257 tokens, the model 100" in refused(capsys, *start, "--model.vocab-size", "100")
    assert not (tmp_path / "runs").exists()


def test_a_tokenizer_larger_than_the_vocabulary(capsys, text, tmp_path):
    from tokenizers import Tokenizer, models

    vocabulary = {f"word{i}": i for i in range(300)} | {"[UNK]": 300}
    file = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")).save(str(file))
    says = refused(
        capsys, "train", MODEL, *SIZES, "--data", text, "--data.tokenizer", file, "--runs", tmp_path
    )
    assert "301 tokens, the model 272" in says


def test_generate_refuses_what_cannot_be(capsys, trained):
    assert "context" in refused(capsys, "generate", trained, "--prompt", "x" * 100)
    assert "context" in refused(capsys, "generate", trained, "--prompt", "x", "--tokens", "1000")
    assert "depth" in refused(capsys, "generate", trained, "--prompt", "x", "--depth", "0")
    assert "no checkpoint of step 7" in refused(capsys, "generate", trained, "--step", "7")
    assert "temperature" in refused(capsys, "generate", trained, "--temperature", "-1")


def test_a_run_of_another_layout_version(capsys, trained, tmp_path):
    note = json.loads((trained / "run.json").read_text())
    for layout in (99, None):
        other = tmp_path / str(layout)
        other.mkdir()
        (other / "run.json").write_text(json.dumps(note | {"layout": layout}))
        assert f"run layout {layout}" in refused(capsys, "eval", other)
    (tmp_path / "run.json").write_text('{"layout": 1, "mod')
    assert "damaged" in refused(capsys, "eval", tmp_path)


def test_a_damaged_checkpoint(capsys, text, tmp_path):
    argv = ["train", MODEL, *SIZES, "--data", text, "--runs", tmp_path, "--name", "run"]
    argv += ["--steps", "2", *model_options(LINEAR_RNN, linear_rnn.TINY)]
    assert main([str(word) for word in argv]) == 0
    capsys.readouterr()
    arrays = sorted((tmp_path / "run" / "checkpoints" / "2" / "params").rglob("*"))
    largest = max((file for file in arrays if file.is_file()), key=lambda file: file.stat().st_size)
    whole = largest.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[: len(whole) // 2], bytes(flipped)):
        largest.write_bytes(damaged)
        assert "checkpoints" in refused(capsys, "generate", tmp_path / "run", "--prompt", "a")
        assert "checkpoints" in refused(capsys, *argv)
    largest.write_bytes(whole)
    assert main(["eval", str(tmp_path / "run"), "--batches", "1"]) == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_more(capsys, monkeypatch, trained, number):
    """The first thing to fail may be a line of metrics, not a checkpoint."""

    def full(*_):
        raise OSError(number, os.strerror(number), "metrics.jsonl")

    monkeypatch.setattr("jaxrec.cli.evaluate.run", full)
    assert "cannot use metrics.jsonl" in refused(capsys, "eval", trained)


def test_a_pararnn_trains_by_newtons_method(capsys, text, tmp_path):
    argv = ["train", "jaxrec.models.pararnn:TINY_GRU", *SIZES, "--data", text, "--runs", tmp_path]
    argv += ["--name", "run", "--steps", "2", "--model.width", "16", "--model.layers", "1"]
    argv += ["--model.mlp-width", "24", "--model.context", "64"]
    argv += ["--model.solver.method", "newton", "--model.solver.clip", "1.0"]
    assert main([str(word) for word in argv]) == 0
    capsys.readouterr()
    note = json.loads((tmp_path / "run" / "run.json").read_text())
    assert note["model_config"]["solver"]["clip"] == 1.0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    measured = [line for line in map(json.loads, lines) if "newton_iterations" in line]
    assert measured and all(1 <= line["newton_iterations"] <= 16 for line in measured)


def test_train_generate_eval_and_data_work_together(capsys, text, tmp_path):
    tokens = tmp_path / "tokens"
    assert main(["data", str(text), str(tokens), "--valid-fraction", "0.2"]) == 0
    argv = ["train", "jaxrec.models.huginn:TINY", *SIZES, "--data", tokens, "--runs", tmp_path]
    argv += ["--name", "run", "--steps", "2", *model_options(HUGINN, huginn.TINY)]
    argv += ["--mesh", "data=2", "--sample-every", "1", "--optimizer.ema-decay", "0.5"]
    assert main([str(word) for word in argv]) == 0
    said = capsys.readouterr().out
    samples = (tmp_path / "run" / "samples.txt").read_text()
    assert [line for line in samples.splitlines() if line.startswith("--- step ")] == [
        "--- step 1",
        "--- step 2",
    ]
    for line in (
        "depth 1 ",
        "depth 8 ",
        "gzip -9",
        "order-3",
        "the model's own depth",
        "jaxrec generate",
    ):
        assert line in said
    assert (tmp_path / "run" / "curves.png").stat().st_size > 5000
    assert main(["eval", str(tmp_path / "run"), "--depths", "1,2", "--json", "--batches", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["bits_per_byte"]) == {"1", "2"}
    assert main(["eval", str(tmp_path / "run"), "--ema", "--depths", "2", "--batches", "1"]) == 0
    heading, columns, row = capsys.readouterr().out.splitlines()
    assert "step 2" in heading and columns.split() == ["depth", "nats/token", "bits/byte"]
    assert row.split()[0] == "2" and float(row.split()[2]) > 0
    generate = [
        "generate",
        str(tmp_path / "run"),
        "--prompt",
        "def",
        "--tokens",
        "5",
        "--seed",
        "3",
        "--ema",
        "--top-k",
        "5",
        "--min-p",
        "0.01",
    ]
    texts = []
    for _ in range(2):
        assert main(generate) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("def")


def test_a_configuration_file(capsys, text, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"steps: 2\nbatch: 8\ntime: 16\neval_batches: 1\nname: filed\ndata:\n  source: {text}\n"
        "optimizer:\n  learning_rate: 1e-3\n"
        "model:\n  width: 16\n  layers: 1\n  recurrent_width: 16\n"
    )
    argv = ["train", MODEL, "--config", str(file), "--runs", str(tmp_path), "--steps", "1"]
    assert main(argv) == 0
    note = json.loads((tmp_path / "filed" / "run.json").read_text())
    assert note["train"]["steps"] == 1
    assert note["model_config"]["layers"] == 1
    # A file changes what a run that begins from another one has without it, such as its name.
    file.write_text(f"steps: 1\nbatch: 8\ntime: 16\ndata:\n  source: {text}\n")
    begun = ["train", str(tmp_path / "filed"), "--config", str(file), "--runs", str(tmp_path)]
    assert main(begun) == 0
    assert json.loads((tmp_path / "filed-on" / "run.json").read_text())["train"]["batch"] == 8
    capsys.readouterr()
    file.write_text("stepss: 2\n")
    assert "Did you mean steps?" in refused(capsys, *argv)
    file.write_text("model:\n  widht: 2\n")
    assert "Did you mean width?" in refused(capsys, *argv)


def test_list_names_every_model(capsys):
    assert main(["list", "--json"]) == 0
    rows = {row["path"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["jaxrec.models.huginn:HUGINN_3_5B"]["conversion"]
    assert rows["jaxrec.models.linear_rnn:TINY"]["parameters"] is None
    assert rows["jaxrec.models.sequence_classifier:LRA_IMAGE"]["experiment"]
    kinds = ("huginn:TINY", "hrm:SUDOKU_4X4", "sequence_classifier:LRA_IMAGE", "vit:VIT_T")
    trains_on = [rows[f"jaxrec.models.{kind}"]["trains_on"] for kind in kinds]
    assert trains_on == ["text", "puzzles", "sequences", None]
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert "jaxrec.models.huginn:TINY" in shown
    assert "parameters" not in shown and "…" not in shown


def test_list_counts_the_parameters_of_what_is_asked_for(capsys):
    assert main(["list", "huginn:HUGINN", "--counts"]) == 0
    shown = capsys.readouterr().out
    assert "3,564,976,800" in shown and "linear_rnn" not in shown
    assert "No configuration has 'hugin:'" in refused(capsys, "list", "hugin:")


@pytest.mark.slow
def test_list_counts_all():
    rows = list_systems.systems(counts=True)
    assert len(rows) > 40
    assert all(row["parameters"] > 0 for row in rows)


def test_help_names_every_command_and_is_quick(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)
    code = "import sys; from jaxrec.cli.main import main; main(['--help'])"
    code += "; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_virtual_devices_get_threads_to_wait_in(monkeypatch, capsys):
    """Some programs never end with one for each device."""
    monkeypatch.delenv("PJRT_NPROC")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    assert main(["--help"]) == 0
    assert os.environ["PJRT_NPROC"] == "32"


def test_a_printed_command_says_the_same_again():
    words = ["--steps", "700", "--data", "my text", "--optimizer.ema-decay", "0.9", "--tensorboard"]
    words += ["--eval-depths", "1", "4", "--model.no-tie-embeddings", "--model.width", "64"]
    path, arguments = parse(["jaxrec.models.huginn:TINY", *words])
    command = shlex.split(command_line(path, arguments))
    again = parse(command[command.index("train") + 1 :])
    assert again[0] == path
    for part in ("model", "train", "options"):
        assert getattr(again[1], part) == getattr(arguments, part)


def test_a_printed_command_can_be_typed(tmp_path, monkeypatch):
    script = tmp_path / ".venv" / "bin" / "jaxrec"
    script.parent.mkdir(parents=True)
    script.write_text("")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PATH", "")
    assert program() == ".venv/bin/jaxrec"
    monkeypatch.setenv("PATH", str(script.parent))
    assert program() == "jaxrec"
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["a notebook"])
    assert program() == f"{sys.executable} -m jaxrec"


def test_fewer_steps_than_were_made_are_refused(capsys, text, trained):
    start = ["train", "jaxrec.models.huginn:TINY", *model_options(HUGINN, huginn.TINY)]
    start += ["--runs", trained.parent, "--name", "run", "--batch", "8", "--time", "16"]
    start += ["--data", text, "--data.valid-fraction", "0.2", "--optimizer.learning-rate", "3e-3"]
    start += ["--optimizer.warmup-steps", "0", "--optimizer.schedule", "constant"]
    assert "made 2 steps already" in refused(capsys, *start, "--steps", "1")
    assert "there is no run" in refused(capsys, *start, "--resume", "--name", "typo")
    assert not (trained.parent / "typo").exists()
    assert "another model" in refused(capsys, *start, "--model.mlp-width", "32")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_says_so_and_is_no_failure(kind, text, tmp_path):
    """Through the command line, in a process of its own."""
    config = run_config(text, steps=100_000, save_every=0)
    log, metrics = tmp_path / "log", tmp_path / "run" / "metrics.jsonl"
    with started(train_words(MODEL, LINEAR_RNN, config, tmp_path), log=log) as child:
        wait_for_lines(metrics, 2, child)
        child.send_signal(kind)
        assert child.wait(timeout=PATIENCE) == 0
    said = log.read_text()
    (saved,) = re.findall(rf"^{kind.name}: saved step (\d+) in {tmp_path / 'run'}", said, re.M)
    assert (tmp_path / "run" / "checkpoints" / saved).is_dir()
    assert "Go on with:" in said and "--steps 100000" in said
