"""The experiment's small run works, and its full-scale configuration is that of the paper."""

import runpy

import pytest
import yaml

from jaxrec.config import from_dict
from jaxrec.models.universal_transformer import UT_SMALL
from jaxrec.training.data.algorithmic import transduction
from tests.experiments.smoke import EXPERIMENTS, smoke

FOLDER = EXPERIMENTS / "universal_transformer"


@pytest.mark.slow  # three models to compile
def test_smoke(tmp_path):
    results = smoke("universal_transformer", tmp_path)
    universal, plain = results["lengths"]
    assert 0 < universal["parameters"] < plain["parameters"]
    assert set(universal["token_accuracy"]) == set(plain["sequence_accuracy"])
    chains = results["chains"]
    assert set(chains["loops_by_hops"]) == set(chains["accuracy_by_hops"]) == {"1", "2", "3"}


def test_the_full_scale_run_is_launchable_as_it_is_given():
    scale_class = runpy.run_path(str(FOLDER / "run.py"))["Scale"]
    scale = from_dict(scale_class, yaml.safe_load((FOLDER / "full_scale.yaml").read_text()))
    model = scale.model
    assert (model.width, model.heads, model.mlp_width) == (
        UT_SMALL.width,
        UT_SMALL.heads,
        UT_SMALL.mlp_width,
    )
    assert (scale.asked[0], scale.asked[-1]) == (40, 400)
    for rule in scale.rules:
        longest = scale.lengths(rule)[-1]
        asked = transduction(rule, 1, (longest, longest), base=10, seed=0).batch()
        assert max(asked["inputs"].max(), asked["labels"].max()) == model.vocab_size - 1
        assert asked["inputs"].shape[1] <= model.context
