"""The experiment's small run works and reports what the table of its README holds."""

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "experiments" / "s4_lssl"


def test_smoke(tmp_path):
    command = [sys.executable, str(FOLDER / "run.py"), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    results, published = json.loads(done.stdout), json.loads((FOLDER / "results.json").read_text())
    for name in ("S5", "RG-LRU"):
        assert {*results[name]} <= {*published[name]}
        assert 0 <= results[name]["pixels"] <= 1
