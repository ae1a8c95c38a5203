"""The experiment's small run works."""

import pytest

from tests.experiments.smoke import smoke


@pytest.mark.slow  # two models to compile
def test_smoke(tmp_path):
    models = smoke("plstm_lm", tmp_path)["models"]
    assert set(models) == {"pLSTM", "RG-LRU"}
    assert all(model["bits_per_byte"] > 0 for model in models.values())
