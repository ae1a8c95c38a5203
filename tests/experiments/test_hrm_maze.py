"""The experiment's small run works, and the full-scale one reads as it is."""

import pytest

from jaxrec.cli.train import parse
from jaxrec.models.hrm import MAZE_5X5, MAZE_27M
from jaxrec.training.data.puzzle_sources import made_size
from tests.experiments.smoke import EXPERIMENTS, smoke


@pytest.mark.slow  # three programs to compile
def test_smoke(tmp_path):
    results = smoke("hrm_maze", tmp_path)
    assert len(results["exact"]) == 4 and results["puzzles"] == 10
    assert len(results["path_marked"]) == len(results["marks_right"]) == 4
    assert [len(group["exact"]) for group in results["by_length"]] == [4] * 4
    lengths = [group["steps_of_path"] for group in results["by_length"]]
    assert lengths == sorted(lengths) and lengths[0][0] >= 1


def test_the_full_scale_run_is_the_published_one():
    file = EXPERIMENTS / "hrm_maze" / "full_scale.yaml"
    _, arguments = parse(["jaxrec.models.hrm:MAZE_27M", "--config", str(file), "--data", "x"])
    assert arguments.model == MAZE_27M
    assert arguments.train.data.epochs == 2000
    assert arguments.train.optimizer.weight_decay == arguments.train.puzzle_decay == 1.0


def test_the_small_model_reads_the_mazes_of_its_name():
    assert made_size("maze-5x5") == (MAZE_5X5.length, MAZE_5X5.vocab_size)
