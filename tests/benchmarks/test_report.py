"""The tables of benchmarks/README.md are those of the files of results."""

import runpy
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_tables_are_those_of_the_results():
    report = runpy.run_path(str(BENCHMARKS / "report.py"))["report"]()
    assert report == (BENCHMARKS / "README.md").read_text(), "run: python benchmarks/report.py"


def test_the_curve_of_lengths_is_drawn(tmp_path):
    runpy.run_path(str(BENCHMARKS / "report.py"))["plot_lengths"](tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    assert (BENCHMARKS / "results" / "scan_lengths.png").stat().st_size > 10_000
