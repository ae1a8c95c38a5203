"""The experiment's small run works, and its full-scale configuration can be read."""

import json
import subprocess
import sys
from pathlib import Path

from jaxrec.cli.train import parse

FOLDER = Path(__file__).parents[2] / "experiments" / "huginn"


def test_smoke(tmp_path):
    command = [sys.executable, str(FOLDER / "run.py"), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert set(results["huginn"]["bits_per_byte"]) == {"1", "2"}


def test_the_full_scale_run_is_launchable_as_it_is_given():
    file = FOLDER / "full_scale.yaml"
    _, arguments = parse(
        ["jaxrec.models.huginn:HUGINN_3_5B", "--config", str(file), "--data", "tokens"]
    )
    assert arguments.train.batch * arguments.train.time == 2**24
    assert arguments.train.data.source == "tokens"
