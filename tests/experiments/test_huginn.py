"""The experiment's small run works, and its full-scale configuration can be read."""

import pytest

from jaxrec.cli.train import parse
from tests.experiments.smoke import EXPERIMENTS, smoke


@pytest.mark.slow  # a whole run of training
def test_smoke(tmp_path):
    results = smoke("huginn", tmp_path)
    assert set(results["huginn"]["bits_per_byte"]) == {"1", "2"}


def test_the_full_scale_run_is_launchable_as_it_is_given():
    file = EXPERIMENTS / "huginn" / "full_scale.yaml"
    _, arguments = parse(
        ["jaxrec.models.huginn:HUGINN_3_5B", "--config", str(file), "--data", "tokens"]
    )
    assert arguments.train.batch * arguments.train.time == 2**24
    assert arguments.train.data.source == "tokens"
