"""The experiment's small run works."""

import pytest

from tests.experiments.smoke import smoke


@pytest.mark.slow  # two programs to compile
def test_smoke(tmp_path):
    results = smoke("hrm_sudoku", tmp_path)
    assert len(results["exact_accuracy_by_segment"]) == results["max_segments"]
    assert 1 <= results["halted_segments"] <= results["max_segments"]
