"""The experiment's small run works, with one setting of every sampler, alone and in a batch."""

import pytest

from tests.experiments.smoke import smoke


@pytest.mark.slow  # eight programs of samplers to compile
def test_smoke(tmp_path):
    records = smoke("parallel_sampler", tmp_path)["results"]
    samplers = {"autoregressive", "adaptive", "speculative", "diffusion-forcing"}
    for batch in (1, 2):
        rows = [x for x in records if x["batch"] == batch]
        assert {x["sampler"] for x in rows} == samplers
        assert rows[0]["faster"] == rows[0]["fewer_passes"] == rows[0]["same_tokens"] == 1
        assert all(x["passes_per_token"] > 0 and x["nats_per_token"] > 0 for x in rows)
