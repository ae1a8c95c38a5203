"""The experiment's small run works: depths of the text, values by depth."""

import pytest

from tests.experiments.smoke import smoke


@pytest.mark.slow  # trains two models
def test_smoke(tmp_path):
    results = smoke("recurrent_depth", tmp_path)
    assert set(results["text"]["bits_per_byte"]) == {"1", "2"}
    task = results["task"]
    assert {"1", "8", "32"} <= set(task["accuracy"])
    assert all(len(row) == 24 for row in [*task["accuracy"].values(), task["loops_to_settle"]])
