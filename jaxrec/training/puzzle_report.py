"""What a run of a solver shows: a table by segment, curves, and grids as they are solved."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.models.hrm import HRM, Rows
from jaxrec.training import pondering
from jaxrec.training.data.batches import IGNORED
from jaxrec.training.data.puzzle_sources import Look, PuzzleData
from jaxrec.training.metrics import read
from jaxrec.training.puzzles import PuzzleScores

LEGEND = "4 given, .4 filled in, *4 changed in this segment, 4! wrong"


class Solving(NamedTuple):
    """A puzzle while it is being solved; tokens of grids (x y)."""

    question: np.ndarray
    answers: np.ndarray  # (M x y), after each of M segments
    wanted: np.ndarray  # IGNORED where nothing is asked
    halts: np.ndarray  # bool (M): q_halt > q_continue


def solving(model: HRM, data: PuzzleData, index: int) -> Solving:
    """Lets a model solve one of the held-out puzzles, in as many segments as it may take.

    Raises:
      IndexError: there is no such puzzle.
    """
    rows = data.held_out(1)(index)
    found = jax.jit(pondering.solve)(model, Rows(*map(jnp.asarray, rows)))
    shape = data.look.shape
    return Solving(
        rows.tokens.reshape(shape),
        np.asarray(found.answers).reshape(-1, *shape),
        rows.labels.reshape(shape),
        np.asarray(found.q[:, 0, 0] > found.q[:, 0, 1]),
    )


def drawn(puzzle: Solving, look: Look) -> str:
    """The question and the grid after each segment as text, see LEGEND; the grids stand one below
    the other.
    """
    return "\n\n".join(_parts(puzzle, look))


def _parts(puzzle: Solving, look: Look) -> Iterator[str]:
    question, wanted = puzzle.question, puzzle.wanted
    asked = wanted != IGNORED
    given = np.zeros_like(asked) if look.open is None else question != look.open
    plain = np.full(asked.shape, " ")
    yield f"question\n{_grid(question, look, plain, plain)}"
    before = question
    for segment, (answer, halts) in enumerate(zip(puzzle.answers, puzzle.halts, strict=True), 1):
        shown = np.where(asked, answer, question)
        wrong = asked & (answer != wanted)
        front = np.where(given, " ", np.where(shown != before, "*", "."))
        right = int(np.sum(asked & ~wrong))
        end = "; would halt here" if halts else ""
        yield (
            f"segment {segment}: {right} of {int(np.sum(asked))} places right{end}\n"
            f"{_grid(shown, look, front, np.where(wrong, '!', ' '))}"
        )
        before = shown


def _grid(tokens: np.ndarray, look: Look, front: np.ndarray, behind: np.ndarray) -> str:
    rows = zip(front, tokens, behind, strict=True)
    return "\n".join(
        "".join(f"{a}{look.symbols[token]}{b}" for a, token, b in zip(*row, strict=True)).rstrip()
        for row in rows
    )


def animation(puzzle: Solving, look: Look, *, seconds: float = 1.0) -> Any:
    """The same as an animation of matplotlib: given tokens are black, right ones blue, wrong ones
    red, and what a segment has changed stands on yellow.

    Args:
      puzzle: from `solving`.
      look: of its data.
      seconds: that a segment is shown.
    """
    from matplotlib.animation import FuncAnimation
    from matplotlib.figure import Figure

    question, wanted = puzzle.question, puzzle.wanted
    asked = wanted != IGNORED
    given = np.zeros_like(asked) if look.open is None else question != look.open
    frames = [question, *(np.where(asked, answer, question) for answer in puzzle.answers)]
    rows, columns = look.shape
    cell = min(0.45, 5 / max(rows, columns))
    figure = Figure(figsize=(cell * columns + 0.2, cell * rows + 0.6), layout="constrained")
    axis = figure.add_subplot()
    axis.set(xticks=np.arange(columns) - 0.5, yticks=np.arange(rows) - 0.5)
    axis.tick_params(length=0, labelbottom=False, labelleft=False)
    axis.grid(color="0.7", linewidth=0.5)
    ground = axis.imshow(np.zeros(look.shape), cmap="Wistia", vmin=0, vmax=2, alpha=0.6)
    texts = [
        axis.text(y, x, "", ha="center", va="center", fontsize=40 * cell, family="monospace")
        for x, y in np.ndindex(*look.shape)
    ]

    def draw(frame: int) -> list[Any]:
        tokens = frames[frame]
        changed = tokens != frames[max(frame - 1, 0)]
        ground.set_data(np.ma.masked_where(~changed, np.ones(look.shape)))
        wrong = asked & (tokens != wanted) & (frame > 0)
        cells = zip(texts, tokens.flat, given.flat, wrong.flat, strict=True)
        for text, token, is_given, is_wrong in cells:
            text.set_text(look.symbols[token])
            text.set_color("crimson" if is_wrong else "black" if is_given else "royalblue")
        axis.set_title(f"segment {frame}" if frame else "question", fontsize="medium")
        return [ground, *texts]

    return FuncAnimation(figure, draw, frames=len(frames), interval=1000 * seconds, blit=False)


def table(scores: PuzzleScores) -> str:
    """The scores as text."""
    lines = [f"{'segments':>8}  {'solved':>7}  {'right tokens':>12}"]
    for segment, (exact, right) in enumerate(zip(scores.exact, scores.accuracy, strict=True), 1):
        lines.append(f"{segment:>8}  {exact:7.1%}  {right:12.2%}")
    lines.append(
        f"Halting by itself: {scores.halted_exact:.1%} solved in {scores.halted_segments:.2f}"
        " segments on average."
    )
    if scores.two_attempts is not None:
        lines.append(f"Two attempts by vote over all variants: {scores.two_attempts:.1%} solved.")
    return "\n".join(lines)


def plot_puzzle_curves(folder: Path) -> Path | None:
    """Draws the share of solved puzzles over steps and over segments; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = read(folder / "metrics.jsonl")
    training = [line for line in lines if line["kind"] == "train" and "exact_accuracy" in line]
    validation = [line for line in lines if line["kind"] == "valid"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    over_steps, over_segments = figure.subplots(1, 2)
    over_steps.plot(
        [line["step"] for line in training],
        [line["exact_accuracy"] for line in training],
        color="0.6",
        linewidth=1,
        label="training, where it halts",
    )
    segments = range(1, len(validation[-1]["exact"]) + 1) if validation else ()
    for segment in segments:
        over_steps.plot(
            [line["step"] for line in validation],
            [line["exact"][segment - 1] for line in validation],
            marker="o",
            markersize=3,
            label=f"held out, {segment} segment{'s' if segment > 1 else ''}",
        )
    over_steps.set(xlabel="step", ylabel="share solved", title=folder.name)
    if len(segments) <= 8:
        over_steps.legend(frameon=False, fontsize="small")
    if validation:
        last = validation[-1]
        over_segments.plot(segments, last["exact"], marker="o", label="all get as many")
        over_segments.plot(
            last["halted_segments"],
            last["halted_exact"],
            marker="*",
            markersize=13,
            linestyle="none",
            label="each halts by itself (mean)",
        )
        over_segments.legend(frameon=False, fontsize="small")
    over_segments.set(xlabel="segments", ylabel="share solved", title="held out, last step")
    over_segments.xaxis.get_major_locator().set_params(integer=True)
    for panel in (over_steps, over_segments):
        panel.set_ylim(0, 1.03)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.2)
    target = folder / "curves.png"
    figure.savefig(target, dpi=130)
    return target
