"""The experiment's small run works, and the full-scale one reads as it is."""

import pytest

from jaxrec.cli.train import parse
from jaxrec.models.hrm import SUDOKU_27M
from tests.experiments.smoke import EXPERIMENTS, smoke


@pytest.mark.slow  # six programs to compile
def test_smoke(tmp_path):
    results = smoke("hrm_sudoku", tmp_path)
    assert {part: len(found["models"]) for part, found in results.items()} == {"4x4": 2, "9x9": 1}
    for part in results.values():
        for found in part["models"].values():
            assert len(found["exact"]) == 4
            assert 1 <= found["halted_segments"] <= 4
            assert all(1 <= mean <= 4 for _, mean in found["training_segments"])


def test_the_full_scale_run_is_the_published_one():
    file = EXPERIMENTS / "hrm_sudoku" / "full_scale.yaml"
    _, arguments = parse(["jaxrec.models.hrm:SUDOKU_27M", "--config", str(file), "--data", "x"])
    assert arguments.model == SUDOKU_27M
    train = arguments.train
    assert (train.batch, train.optimizer.learning_rate, train.puzzle_decay) == (384, 7e-5, 1.0)
    assert train.data.epochs == 2000
    assert train.steps == 20_000 * 1000 // 384
