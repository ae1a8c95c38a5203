"""The experiment's small run works and reports what the table of its README holds."""

import json

import pytest

from tests.experiments.smoke import EXPERIMENTS, smoke


@pytest.mark.slow  # every classifier to compile
def test_smoke(tmp_path):
    results = smoke("s4_lssl", tmp_path)
    published = json.loads((EXPERIMENTS / "s4_lssl" / "results.json").read_text())
    for name in ("S5", "RG-LRU"):
        assert {*results[name]} <= {*published[name]}
        # One epoch of a tiny model is no better than chance, 10 %, and no worse.
        assert 0.02 <= results[name]["pixels"] <= 0.5
        assert results[name]["parameters"] < published[name]["parameters"] / 10
