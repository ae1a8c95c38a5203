"""Running an experiment's small version as a user would."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def smoke(name: str, folder: Path) -> Any:
    """The results that `run.py --smoke` prints; it must write nothing into `folder`."""
    command = [sys.executable, str(EXPERIMENTS / name / "run.py"), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
    return json.loads(done.stdout)
