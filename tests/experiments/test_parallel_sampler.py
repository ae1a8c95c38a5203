"""The experiment's small run works, with one setting of every sampler, alone and in a batch, and
its full-scale configuration is the published setting."""

import runpy

import pytest
import yaml

from jaxrec.config import from_dict
from jaxrec.generation import DiffusionForcing
from jaxrec.models.huginn import HUGINN_3_5B
from tests.experiments.smoke import EXPERIMENTS, smoke


@pytest.mark.slow  # eight programs of samplers to compile
def test_smoke(tmp_path):
    records = smoke("parallel_sampler", tmp_path)["results"]
    samplers = {"autoregressive", "adaptive", "speculative", "diffusion-forcing"}
    for batch in (1, 2):
        rows = [x for x in records if x["batch"] == batch]
        assert {x["sampler"] for x in rows} == samplers
        assert rows[0]["faster"] == rows[0]["fewer_passes"] == rows[0]["same_tokens"] == 1
        assert all(x["passes_per_token"] > 0 and x["nats_per_token"] > 0 for x in rows)


def test_the_full_scale_run_is_launchable_as_it_is_given(monkeypatch):
    folder = EXPERIMENTS / "parallel_sampler"
    monkeypatch.syspath_prepend(folder)  # as for a script
    script = runpy.run_path(str(folder / "run.py"))
    content = yaml.safe_load((folder / "full_scale.yaml").read_text())
    scale = from_dict(script["Scale"], content)
    ways = script["settings"](scale)
    assert ways[0].options == {"depth": HUGINN_3_5B.mean_depth}
    assert DiffusionForcing() in [way.options.get("options") for way in ways]  # the paper's
    assert script["PROMPT"] + scale.tokens <= HUGINN_3_5B.context
