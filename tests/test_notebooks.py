import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("name", [p.stem for p in sorted(ROOT.glob("notebooks/[0-9][0-9]_*.py"))])
def test_notebook_runs(name):
    command = [sys.executable, "notebooks/run.py", name]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
