"""Writes the tables of benchmarks/README.md from benchmarks/results/*.json, and scan_lengths.png.

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


def plot_lengths(target: Path) -> None:
    """Time and peak memory of `linear_scan` by length, beside what is linear."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = json.loads((HERE / "results" / "scan_lengths_cpu.json").read_text())
    rows = [row for row in found["results"] if row["candidate"] == "jaxrec auto"]
    steps = [row["shape"][1] for row in rows]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, name, label in zip(
        figure.subplots(1, 2), ("median_ms", "peak_mib"), ("ms", "peak MiB"), strict=True
    ):
        for part, text in (("forward", "forward"), ("both", "with the gradient")):
            values = [row[part][name] for row in rows]
            (line,) = panel.plot(steps, values, "o-", label=text)
            linear = [values[0] * t / steps[0] for t in steps]
            panel.plot(steps, linear, ":", color=line.get_color(), linewidth=1)
        panel.set(xscale="log", yscale="log", xlabel="steps t; dotted: linear", ylabel=label)
        panel.grid(alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    figure.suptitle("linear_scan on CPU, (b, t, d) = (1, t, 64)", fontsize="medium")
    figure.savefig(target, dpi=100)


if __name__ == "__main__":
    plot_lengths(HERE / "results" / "scan_lengths.png")
    README.write_text(report())
