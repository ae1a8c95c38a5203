"""What a finished run of a classifier shows: its scores, and curves."""

from pathlib import Path

from jaxrec.training.metrics import read


def plot_classifier_curves(folder: Path) -> Path | None:
    """Draws loss and accuracy over steps; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = read(folder / "metrics.jsonl")
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for kind, label, style in (
            ("train", "training", {"color": "0.6", "linewidth": 1}),
            ("valid", "held out", {"marker": "o", "markersize": 3}),
        ):
            shown = [line for line in lines if line["kind"] == kind]
            panel.plot(
                [line["step"] for line in shown],
                [line[name] for line in shown],
                label=label,
                **style,
            )
        panel.set(xlabel="step", ylabel=name, title=folder.name)
        panel.legend(frameon=False, fontsize="small")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.2)
    target = folder / "curves.png"
    figure.savefig(target, dpi=130)
    return target
