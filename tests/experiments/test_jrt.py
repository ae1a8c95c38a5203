"""The experiment's small run works: every reading, every order of the lists."""

import pytest

from jaxrec.cli.train import parse
from tests.experiments.smoke import EXPERIMENTS, smoke


@pytest.mark.slow  # three models to compile, each for training and for each order
def test_smoke(tmp_path):
    models = smoke("jrt", tmp_path)["models"]
    assert [model["reading"] for model in models] == ["causal", "prefix", "read twice"]
    for model in models:
        assert set(model["accuracy"]) == {"1_4", "4_1", "2_8", "8_2", "2_24", "24_2"}
        assert all(0 <= share <= 1 for share in model["accuracy"].values())


def test_the_full_scale_run_is_launchable_as_it_is_given():
    file = EXPERIMENTS / "jrt" / "full_scale.yaml"
    name = "jaxrec.models.prefix_linear:JRT_360M"
    _, arguments = parse([name, "--config", str(file), "--data", "tokens"])
    train = arguments.train
    assert 30e9 < train.steps * train.batch * train.time < 32e9
    assert arguments.model.prefix_share * train.time == 1024
