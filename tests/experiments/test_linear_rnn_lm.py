"""The experiment's small run works."""

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "experiments" / "linear_rnn_lm"


def test_smoke(tmp_path):
    command = [sys.executable, str(FOLDER / "run.py"), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    models = json.loads(done.stdout)["models"]
    assert set(models) == {"RG-LRU", "Mamba", "RecurrentGemma", "transformer"}
    assert all(model["bits_per_byte"] > 0 for model in models.values())
    assert not list(tmp_path.iterdir())
