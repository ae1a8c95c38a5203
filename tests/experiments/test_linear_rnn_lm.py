"""The experiment's small run works."""

import pytest

from tests.experiments.smoke import smoke


@pytest.mark.slow  # four models to compile
def test_smoke(tmp_path):
    models = smoke("linear_rnn_lm", tmp_path)["models"]
    assert set(models) == {"RG-LRU", "Mamba", "RecurrentGemma", "transformer"}
    assert all(model["bits_per_byte"] > 0 for model in models.values())
