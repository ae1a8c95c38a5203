"""The experiment's small run works: every reading, every order of the lists."""

import pytest

from tests.experiments.smoke import smoke


@pytest.mark.slow  # three models to compile, each for two lengths and more
def test_smoke(tmp_path):
    models = smoke("jrt", tmp_path)["models"]
    assert [model["reading"] for model in models] == ["causal", "prefix", "read twice"]
    for model in models:
        assert set(model["accuracy"]) == {"4_16", "16_4", "8_32", "32_8"}
        assert all(0 <= share <= 1 for share in model["accuracy"].values())
