"""The experiment's small run works: every model on text and on every task."""

import pytest

from tests.experiments.smoke import smoke


@pytest.mark.slow  # twenty models to compile
def test_smoke(tmp_path):
    results = smoke("pararnn", tmp_path)
    text = results["text"]["models"]
    assert set(text) == {"ParaGRU", "ParaLSTM", "RG-LRU", "Mamba", "transformer"}
    assert all(model["bits_per_byte"] > 0 for model in text.values())
    assert all(bool(model["newton"]) == name.startswith("Para") for name, model in text.items())
    assert set(results["state"]["tasks"]) == {"parity", "modular arithmetic", "permutations"}
    for models in results["state"]["tasks"].values():
        assert set(models) == {"ParaGRU", "ParaLSTM", "GRU", "RG-LRU", "transformer"}
        for model in models.values():
            assert list(model["accuracy"]) == ["1-4", "5-8"]
            assert all(0 <= share <= 1 for share in model["accuracy"].values())
