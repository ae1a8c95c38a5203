"""Pictures of both parts."""

from pathlib import Path
from typing import Any

MEASURES = {
    "newton_iterations": "Newton's iterations",
    "newton_residual": "residual",
    "newton_fallback_share": "windows that fell back",
    "max_recurrent": "max |A|",
    "lyapunov": "Lyapunov exponent",
}
"""What a ParaRNN says of itself in training, and what it is called."""


def plot_text(results: dict[str, Any], target: Path) -> None:
    """Bits per byte, and how Newton's method fares with the ParaRNNs."""
    figure, panels = canvas(2, 3)
    for name, model in results["models"].items():
        panels[0].plot(*zip(*model["curve"], strict=True), label=name)
        for panel, measure in zip(panels[1:], MEASURES, strict=True):
            if model["newton"]:
                points = [(line["step"], line[measure]) for line in model["newton"]]
                panel.plot(*zip(*points, strict=True), marker="o", label=name)
    panels[0].set(ylabel="bits per byte in training", ylim=(1.8, 5), xlabel="step")
    for panel, label in zip(panels[1:], MEASURES.values(), strict=True):
        panel.set(ylabel=label, xlabel="step")
    for panel in (panels[1], panels[3], panels[4]):
        panel.set(ylim=(0, None))
    panels[2].set(yscale="log", ylim=(1e-8, 1e-5))
    panels[0].legend(frameon=False)
    panels[1].legend(frameon=False)
    figure.savefig(target, dpi=80)


def plot_state(results: dict[str, Any], target: Path) -> None:
    """Accuracy over position, one panel per task."""
    figure, panels = canvas(1, len(results["tasks"]))
    names = list(dict.fromkeys(name for x in results["tasks"].values() for name in x["models"]))
    for panel, (task, found) in zip(panels, results["tasks"].items(), strict=True):
        for name, model in found["models"].items():
            panel.plot(
                list(model["accuracy"]),
                list(model["accuracy"].values()),
                marker="o",
                label=name,
                color=f"C{names.index(name)}",
            )
        panel.set(
            title=task, xlabel=f"position; trained on {results['trained_at']}", ylim=(0, 1.03)
        )
    panels[0].set(ylabel="share of right answers")
    panels[0].legend(frameon=False)
    figure.savefig(target, dpi=80)


def canvas(rows: int, columns: int) -> tuple[Any, Any]:
    """A figure and its panels in reading order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels:
        panel.grid(alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels
