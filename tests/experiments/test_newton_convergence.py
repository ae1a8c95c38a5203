"""The experiment's small run works, and three iterations of a small gate scale are exact."""

import pytest

from tests.experiments.smoke import smoke


@pytest.mark.slow  # every solver to compile
def test_smoke(tmp_path):
    results = smoke("newton_convergence", tmp_path)
    for record in results["errors"]:
        assert float(record["errors"]["0"]) > 1e-2
        if record["scale"].startswith("default"):
            assert float(record["errors"]["3"]) < 1e-6
    assert all(x["error"] < 1e-5 for x in results["lengths"])
    assert {x["solver"] for x in results["solvers"]} == {
        "newton",
        "quasi_newton",
        "elk",
        "quasi_elk",
        "damped",
        "clipped",
        "windows of 15",
    }
    # Whatever a solver comes to, the safeguard ends at the loop's numbers.
    assert all(x["guarded_error"] < 1e-6 for x in results["solvers"])
