"""What a finished run shows: a table against simple compressors, and curves."""

import json
from pathlib import Path
from typing import Any

from jaxrec.analysis.text_baselines import gzip_bits_per_byte, ngram_bits_per_byte
from jaxrec.training.loop import Outcome
from jaxrec.training.metrics import read
from jaxrec.training.runs import versions

LINE = ("step", "kind", "time")  # of every line of metrics, beside its numbers
MEASURES_PER_ROW = 3
BASELINE_TOKENS = 20_000_000
"""More would not change what a model of three bytes of context learns, only fill the memory."""


def write_report(outcome: Outcome) -> dict[str, Any]:
    """Writes report.json: bits per byte of the model by depth and of two baselines.

    All are measured on validation text. The model reads windows spread over it, each from an empty
    context; the baselines read it in a row, which is to their advantage. Of a large corpus they
    learn from and are measured on the first BASELINE_TOKENS.
    """
    data, evaluation = outcome.data, outcome.evaluation
    assert evaluation is not None, "a run that was stopped has nothing to report"
    train_text, valid_text = (
        data.tokenizer.decode(side.tokens[:BASELINE_TOKENS]) for side in (data.train, data.valid)
    )
    report = {
        "steps": outcome.step,
        "bits_per_byte": evaluation.bits_per_byte,
        "tokens": evaluation.tokens,
        "baselines": {
            "bits_per_byte": {
                "gzip -9": gzip_bits_per_byte(valid_text),
                "order-3 byte model": ngram_bits_per_byte(train_text, valid_text, order=3),
            },
            "bytes": len(valid_text),
        },
        "data": outcome.run.data,
        "versions": versions(),
    }
    (outcome.run.folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def plot_curves(folder: Path) -> Path | None:
    """Draws bits per byte over steps and over depth, and below them what the model said of itself;
    None without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import ScalarFormatter
    except ImportError:
        return None
    lines = read(folder / "metrics.jsonl")
    training = [line for line in lines if line["kind"] == "train"]
    validation = [line for line in lines if line["kind"] == "valid"]
    measured = [line for line in lines if line["kind"] in ("model", "monitor")]
    depths = list(validation[-1]["bits_per_byte"]) if validation else []
    looped = len(depths) > 1

    names = list(dict.fromkeys(name for line in measured for name in line if name not in LINE))
    rows = -(-len(names) // MEASURES_PER_ROW)
    wide = looped or rows
    figure = Figure(figsize=(10 if wide else 5.5, 4 + 2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    top, *below = figure.subfigures(1 + rows, 1, height_ratios=[4] + [2] * rows, squeeze=False)[
        :, 0
    ]
    panels = list(top.subplots(1, 2 if looped else 1, squeeze=False)[0])
    curve = panels[0]
    curve.plot(
        [line["step"] for line in training],
        [line["bits_per_byte"] for line in training],
        color="0.6",
        linewidth=1,
        label="training",
    )
    for depth in depths:
        curve.plot(
            [line["step"] for line in validation],
            [line["bits_per_byte"][depth] for line in validation],
            marker="o",
            markersize=3,
            label=f"validation, depth {depth}" if looped else "validation",
        )
    curve.set(xlabel="step", ylabel="bits per byte", title=folder.name)
    curve.legend(frameon=False, fontsize="small")
    if looped:
        panels[1].plot(
            [int(depth) for depth in depths], validation[-1]["bits_per_byte"].values(), marker="o"
        )
        panels[1].set_xscale("log", base=2)
        panels[1].xaxis.set_major_formatter(ScalarFormatter())
        panels[1].set(
            xlabel="loops of the core", ylabel="bits per byte", title="validation, last step"
        )
    for row, part in enumerate(below):
        small = part.subplots(1, MEASURES_PER_ROW)
        shown = names[row * MEASURES_PER_ROW : (row + 1) * MEASURES_PER_ROW]
        for panel, name in zip(small, shown, strict=False):
            _draw(panel, [(line["step"], line[name]) for line in measured if name in line])
            panel.set(title=name.replace("_", " "))
            panel.title.set_size("small")
        for panel in small[len(shown) :]:
            panel.set_visible(False)
        panels += list(small)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.2)
    target = folder / "curves.png"
    figure.savefig(target, dpi=130)
    return target


def _draw(panel: Any, points: list[tuple[int, Any]]) -> None:
    """A number over steps; of several, such as one of each layer, those of the last step."""
    value = points[-1][1]
    if isinstance(value, dict):
        panel.plot(list(value), list(value.values()), marker="o", markersize=3, color="0.3")
    elif isinstance(value, list):
        panel.bar(range(1, len(value) + 1), value, color="0.6")
    else:
        panel.plot(*zip(*points, strict=True), marker="o", markersize=3, color="0.3")
