"""The experiment's small run works."""

import pytest

from tests.experiments.smoke import smoke


@pytest.mark.slow  # three models to compile
def test_smoke(tmp_path):
    results = smoke("universal_transformer", tmp_path)
    universal, plain = results["lengths"]
    assert 0 < universal["parameters"] < plain["parameters"]
    assert set(universal["token_accuracy"]) == set(plain["sequence_accuracy"])
    chains = results["chains"]
    assert set(chains["loops_by_hops"]) == set(chains["accuracy_by_hops"]) == {"1", "2", "3"}
