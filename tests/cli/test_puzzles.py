"""A solver of puzzles at the command line: trained, scored, shown, converted, trained on; and wrong
pairs."""

import json
import shlex

import numpy as np
import pytest

from jaxrec import convert
from jaxrec.cli.main import main
from tests.training.small import write_text

PATH = "jaxrec.models.hrm:SUDOKU_4X4"
SMALL = "--model.width 16 --model.high-layers 1 --model.low-layers 1 --model.max-segments 2"
DATA = "--data sudoku-4x4 --data.puzzles 12 --data.held-out 5 --data.clues 10 12"
RUN = "--steps 3 --batch 8 --log-every 1 --optimizer.ema-decay 0.5"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def typed(text, *paths):
    return main([*shlex.split(text), *map(str, paths)])


@pytest.fixture(scope="module")
def trained(runs):
    """A finished run."""
    assert typed(f"train {PATH} {SMALL} {DATA} {RUN} --name first --runs", runs) == 0
    return runs / "first"


def refused(capsys, *argv):
    assert main([str(word) for word in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_train_says_what_was_learned_and_what_to_type_next(capsys, trained, runs):
    command = f"train {PATH} {SMALL} {DATA} {RUN} --name first --resume --runs"
    assert typed(command, runs) == 0  # it has ended; the table is printed again
    said = capsys.readouterr().out
    assert "5 held-out puzzles (sudoku-4x4) after 3 steps" in said
    assert "Halting by itself" in said and "eval" in said and "--show" in said
    for name in ("run.json", "metrics.jsonl", "report.json", "curves.png"):
        assert (trained / name).stat().st_size > 100
    assert json.loads((trained / "run.json").read_text())["train"]["puzzle_rate"] == 1e-3
    (go_on,) = [line for line in said.splitlines() if line.startswith("Go on:")]
    assert main(["train", *shlex.split(go_on.partition("train ")[2])]) == 0
    assert "after 6 steps" in capsys.readouterr().out


def test_eval_scores_by_segment(capsys, trained):
    assert typed("eval", trained) == 0
    heading, columns, *rows, halting = capsys.readouterr().out.splitlines()
    assert "5 held-out puzzles" in heading and columns.split()[:2] == ["segments", "solved"]
    assert [row.split()[0] for row in rows] == ["1", "2"] and "segments on average" in halting
    assert typed("eval --json --ema", trained) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["exact"]) == len(found["accuracy"]) == 2
    assert found["two_attempts"] is None
    assert typed("eval --json --data sudoku-4x4 --batches 1", trained) == 0
    assert json.loads(capsys.readouterr().out)["puzzles"] == 5


def test_a_grid_is_shown_as_it_is_being_solved(capsys, trained):
    assert typed("eval --show --puzzle 2", trained) == 0
    said = capsys.readouterr().out
    assert "* changed" not in said and "4 given" in said
    _, question, one, two = said.split("\n\n")
    clues = [[line[3 * i + 1] for i in range(4)] for line in question.splitlines()[1:]]
    assert sum(cell in "1234" for row in clues for cell in row) in range(10, 13)
    for part in (one, two):
        heading, *grid = part.splitlines()
        assert heading.startswith("segment") and "of 16 places right" in heading
        cells = [[line.ljust(12)[3 * i : 3 * i + 3] for i in range(4)] for line in grid]
        for clue, cell in zip(np.ravel(clues), np.ravel(cells), strict=True):
            assert (cell[0] == " ") == (clue != ".")
            assert cell[2] in " !"
    assert "*" in one
    assert typed("eval --show --puzzle 2 --json", trained) == 0
    found = json.loads(capsys.readouterr().out)
    assert np.shape(found["answers"]) == (2, 4, 4) and len(found["halts"]) == 2


def test_a_checkpoint_becomes_a_run_that_is_scored_trained_on_and_written_again(
    capsys, trained, tmp_path
):
    published, run, back = (tmp_path / name for name in ("published", "run", "back"))
    assert typed("convert hrm --export", trained, published) == 0
    assert typed("convert hrm", published, run) == 0
    assert "eval" in capsys.readouterr().out
    data = "--data.puzzles 12 --data.held-out 5 --data.clues 10 12"
    assert typed("eval --json", run) == 0  # of puzzles like those it was trained on
    assert json.loads(capsys.readouterr().out)["puzzles"] == 200
    assert typed(f"train {run} {data} {RUN} --runs", tmp_path / "more") == 0
    assert "after 3 steps" in capsys.readouterr().out
    assert typed("convert hrm --export --step 0", run, back) == 0
    tensors, again = convert.engine.read_tensors(published), convert.engine.read_tensors(back)
    for name, tensor in again.items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)
    assert again.keys() == tensors.keys()
    assert "tokenizer" in refused(
        capsys, "convert", "hrm", published, tmp_path / "new", "--tokenizer", "bytes"
    )


def test_wrong_pairs_of_model_and_data_are_one_line(capsys, tmp_path):
    text = write_text(tmp_path / "text")
    start = ["train", PATH, "--runs", tmp_path / "runs"]
    assert "python-docs, which is text" in refused(capsys, *start, "--data", "python-docs")
    assert "holds no puzzles" in refused(capsys, *start, "--data", text)
    assert "no puzzles 'missing'" in refused(capsys, *start, "--data", "missing")
    says = refused(capsys, *start, "--data", "sudoku-6x6", "--data.puzzles", "1", "--data.clues",
                   "30", "30", "--data.held-out", "1")  # fmt: skip
    assert "--model.length 36 --model.vocab-size 8" in says
    language = ["train", "jaxrec.models.huginn:TINY", "--runs", tmp_path / "runs"]
    assert "are puzzles" in refused(capsys, *language, "--data", "sudoku-4x4")
    assert "are puzzles" in refused(capsys, *language, "--data", "maze-8x8")
    assert "--time" in refused(capsys, *start, "--time", "16")
    assert not (tmp_path / "runs").exists()


def test_what_a_run_of_a_solver_cannot_do(capsys, trained):
    assert "--show" in refused(capsys, "generate", trained, "--prompt", "a")
    assert "Leave --depths out" in refused(capsys, "eval", trained, "--depths", "1,2")
    assert "--puzzle must be 0 .. 4, got 5" in refused(
        capsys, "eval", trained, "--show", "--puzzle", "5"
    )
    assert "batches must be at least 1" in refused(capsys, "eval", trained, "--batches", "0")
    assert "reads 16 places" in refused(capsys, "eval", trained, "--data", "maze-6x6")
