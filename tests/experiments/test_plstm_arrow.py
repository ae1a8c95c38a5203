"""The experiment's small run works, and its published sizes are what was published."""

import importlib.util

import jax
import pytest

from tests.experiments.smoke import EXPERIMENTS, smoke
from tests.models import toy


def module():
    path = EXPERIMENTS / "plstm_arrow" / "run.py"
    spec = importlib.util.spec_from_file_location("plstm_arrow_run", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.slow  # two models to compile
def test_smoke(tmp_path):
    models = smoke("plstm_arrow", tmp_path)["models"]
    assert set(models) == {"P only", "ViT"}
    for row in models.values():
        assert set(row["accuracy"]) == {"24", "30"}
        assert all(0 <= share <= 1 for shares in row["accuracy"].values() for share in shares)


def test_models_that_are_compared_have_about_as_many_parameters():
    run = module()
    for scale in (run.SMALL, run.PUBLISHED):
        counts = [toy.parameters(scale.model(name)) for name in run.NAMES]
        assert max(counts) < 1.15 * min(counts), counts


def test_the_published_run_fits_together():
    """100 000 pictures for 50 epochs in batches of 128: shapes only."""
    run = module()
    scale = run.PUBLISHED
    assert scale.settings(1).epochs * (scale.examples[0] // scale.batch) == 39_050
    for name in run.NAMES:
        config = scale.model(name)
        for size in scale.sizes:
            images = jax.ShapeDtypeStruct((scale.batch, size, size, 3), "float32")
            shape = jax.eval_shape(lambda x, c=config: toy.abstract(c)(x), images)
            assert shape.shape == (128, 2) and shape.dtype == "float32"
