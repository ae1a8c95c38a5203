"""The experiment's small run works: every model on text and on every task; and its full-scale
configuration can be read."""

import pytest

from jaxrec.cli.train import parse
from tests.experiments.smoke import EXPERIMENTS, smoke


@pytest.mark.slow  # twenty models to compile
def test_smoke(tmp_path):
    results = smoke("pararnn", tmp_path)
    text = results["text"]["models"]
    assert set(text) == {"ParaGRU", "ParaLSTM", "RG-LRU", "Mamba", "transformer"}
    assert all(model["bits_per_byte"] > 0 for model in text.values())
    assert all(bool(model["newton"]) == name.startswith("Para") for name, model in text.items())
    assert set(results["state"]["tasks"]) == {"parity", "modular arithmetic", "permutations"}
    for task in results["state"]["tasks"].values():
        models = task["models"]
        assert set(models) == {
            *("ParaGRU", "ParaLSTM", "sLSTM", "sLSTM, one head"),
            *("GRU", "RG-LRU", "transformer"),
        }
        for model in models.values():
            assert list(model["accuracy"]) == ["1-4", "5-8"]
            assert all(0 <= share <= 1 for share in model["accuracy"].values())


@pytest.mark.parametrize("model", ["PARAGRU_1B", "PARALSTM_1B"])
def test_the_full_scale_run_is_launchable_as_it_is_given(model):
    file = EXPERIMENTS / "pararnn" / "full_scale.yaml"
    name = f"jaxrec.models.pararnn:{model}"
    _, arguments = parse([name, "--config", str(file), "--data", "tokens"])
    tokens = arguments.train.steps * arguments.train.batch * arguments.train.time
    assert tokens == pytest.approx(20 * 1.27e9, rel=0.15)  # as many as Chinchilla's rule asks for
    assert arguments.train.optimizer.warmup_steps == arguments.train.steps // 10
