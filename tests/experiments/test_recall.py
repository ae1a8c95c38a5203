"""The experiment's small run works, with every rule once."""

import pytest

from tests.experiments.smoke import smoke


@pytest.mark.slow  # ten models to compile
def test_smoke(tmp_path):
    models = smoke("recall", tmp_path)["models"]
    assert len({model["name"] for model in models}) == len(models) == 10
    sizes = {model["name"]: model["state_numbers"] for model in models}
    assert sizes["transformer"] > sizes["KDA"] == sizes["DeltaNet"] > 0
