"""Writes the tables of benchmarks/README.md from benchmarks/results/*.json.

    python benchmarks/report.py

No number of the README is written by hand.
"""

import json
from pathlib import Path

from jaxrec.cli import bench_tables

HERE = Path(__file__).parent
README = HERE / "README.md"
MARK = "<!-- Below this line everything is written by benchmarks/report.py. -->"


def markdown(table: bench_tables.Table) -> list[str]:
    names = [name.strip() for name in table.columns.split("|")]
    return [
        f"{table.title}.",
        "",
        f"| {' | '.join(names)} |",
        f"|{'---|' * len(names)}",
        *(f"| {' | '.join(row)} |" for row in table.rows),
        "",
    ]


def report() -> str:
    """The README with the tables of all results."""
    lines = [README.read_text().partition(MARK)[0] + MARK, ""]
    for path in sorted((HERE / "results").glob("*.json")):
        found = json.loads(path.read_text())
        lines += [f"`results/{path.name}`: {bench_tables.machine(found)}.", ""]
        for table in bench_tables.tables(found):
            lines += markdown(table)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    README.write_text(report())
