"""The tables of benchmarks/README.md are those of the files of results."""

import runpy
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_tables_are_those_of_the_results():
    report = runpy.run_path(str(BENCHMARKS / "report.py"))["report"]()
    assert report == (BENCHMARKS / "README.md").read_text(), "run: python benchmarks/report.py"
