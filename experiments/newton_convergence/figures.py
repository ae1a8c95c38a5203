"""The picture."""

from pathlib import Path
from typing import Any


def plot(results: dict[str, Any], scales: list[str], solvers: list[str], target: Path) -> None:
    """Errors by iteration, iterations by length, and by the Lyapunov exponent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for record in results["errors"]:
        if (record["cell"], record["time"]) == ("gru", 2048):
            errors = {int(k): float(e) for k, e in record["errors"].items()}
            left.semilogy(list(errors), list(errors.values()), marker="o", label=record["scale"])
    left.set(
        xlabel="iteration", ylabel="largest error", ylim=(1e-8, 1e3), title="ParaGRU, t = 2048"
    )
    for scale in scales:
        points = [x for x in results["lengths"] if (x["scale"], x["dtype"]) == (scale, "float32")]
        middle.semilogx(
            [x["time"] for x in points], [x["iterations"] for x in points], marker="o", label=scale
        )
    middle.set(xlabel="t", ylabel="iterations, at most 16", title="windows of 1024 steps, float32")
    for name in solvers:
        points = [x for x in results["solvers"] if x["solver"] == name]
        exponents = [x["lyapunov"] for x in points]
        right.plot(exponents, [x["iterations"] for x in points], "o", markersize=4, label=name)
    right.axvline(0, color="0.7")
    right.set(xlabel="Lyapunov exponent", ylabel="iterations", title="dense GRU, t = 90")
    for panel in (left, middle, right):
        panel.legend(frameon=False, fontsize="small")
        panel.grid(alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=80)
