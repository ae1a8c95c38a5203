"""A classifier of sequences at the command line: trained, scored, trained on; and wrong pairs."""

import json
import shlex

import numpy as np
import pytest

from jaxrec.cli.main import main

PATH = "jaxrec.models.sequence_classifier:DIGITS"
SMALL = "--model.mixer.width 8 --model.mixer.state 4 --model.layers 1"
RUN = "--steps 3 --batch 8 --log-every 1 --data.valid-fraction 0.01 --optimizer.ema-decay 0.5"


def typed(text, *paths):
    return main([*shlex.split(text), *map(str, paths)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(runs):
    """A finished run."""
    command = f"train {PATH} {SMALL} --data digits {RUN} --name first --runs"
    assert typed(command, runs) == 0
    return runs / "first"


def refused(capsys, *argv):
    assert main([str(word) for word in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_train_says_what_was_learned_and_what_to_type_next(capsys, trained, runs):
    command = f"train {PATH} {SMALL} --data digits {RUN} --name first --resume --runs"
    assert typed(command, runs) == 0  # it has ended; what it says is printed again
    said = capsys.readouterr().out
    assert "18 held-out examples (digits) after 3 steps" in said and "% right" in said
    assert "Evaluate:" in said
    for name in ("run.json", "metrics.jsonl", "report.json", "curves.png"):
        assert (trained / name).stat().st_size > 100
    (go_on,) = [line for line in said.splitlines() if line.startswith("Go on:")]
    assert main(["train", *shlex.split(go_on.partition("train ")[2])]) == 0
    assert "after 6 steps" in capsys.readouterr().out
    assert typed(f"train {trained} --name next {RUN} --steps 1 --runs", runs) == 0
    assert "after 1 steps" in capsys.readouterr().out


def test_eval_scores_at_any_rate(capsys, trained):
    assert typed("eval", trained) == 0
    assert "18 held-out examples: " in capsys.readouterr().out

    def found(options):
        assert typed(f"eval --json {options}", trained) == 0
        return json.loads(capsys.readouterr().out)

    plain, doubled = found("--ema"), found("--ema --rate 2")
    assert plain["examples"] == doubled["examples"] == 18
    assert 0 < abs(doubled["loss"] - plain["loss"]) < 0.1
    assert found("--batches 1 --data digits-permuted")["examples"] == 8


def test_what_a_run_of_a_classifier_cannot_do(capsys, trained):
    assert "leave --depths" in refused(capsys, "eval", trained, "--depths", "1,2")
    assert "data.rate must be positive" in refused(capsys, "eval", trained, "--rate", "0")
    assert "reads no text" in refused(capsys, "generate", trained, "--prompt", "a")
    assert "is a classifier; plans are made for" in refused(capsys, "plan", PATH)
    assert "classifies sequences" in refused(capsys, "profile", PATH)


def test_wrong_pairs_of_model_and_data_are_one_line(capsys, tmp_path):
    file = tmp_path / "wide.npz"
    np.savez(file, inputs=np.zeros((20, 5, 2)), labels=np.arange(20) % 10)
    start = ["train", PATH, "--batch", "4", "--runs", tmp_path / "runs", "--data"]
    assert "python-docs, which is text" in refused(capsys, *start, "python-docs")
    assert "sudoku-4x4, which are puzzles" in refused(capsys, *start, "sudoku-4x4")
    assert "Did you mean digits?" in refused(capsys, *start, "digit")
    assert "another --model.inputs" in refused(capsys, *start, file)
    for other in ("jaxrec.models.huginn:TINY", "jaxrec.models.hrm:SUDOKU_4X4"):
        said = refused(capsys, "train", other, "--runs", tmp_path / "runs", "--data", "digits")
        assert "digits, which are labelled sequences" in said
    assert not (tmp_path / "runs").exists()
