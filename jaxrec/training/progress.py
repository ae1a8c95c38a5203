"""The progress of a run on the terminal: a bar when someone is watching, plain lines otherwise."""

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class RunProgress:
    """Shows step, loss, what else is measured, speed and time left. Use as a context manager.

    On an interactive terminal it is one line that is drawn again; in a file or a pipe, each
    `update` is a line.

    Args:
      steps: length of the run.
      start: step at which it resumes.
      stream: where to write; standard output by default.
      clock: seconds, increasing; tests pass their own.
    """

    def __init__(
        self,
        steps: int,
        *,
        start: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps, self._start, self._clock = steps, start, clock
        # In a notebook rich would show all of it there, whatever the stream.
        self._console = Console(
            file=stream or sys.stdout, highlight=False, soft_wrap=True, force_jupyter=False
        )
        self._bar: Progress | None = None
        self._begin = clock()
        if self._console.is_terminal:
            columns = BarColumn(bar_width=24), TextColumn("{task.description}")
            self._bar = Progress(*columns, console=self._console, transient=False)
            self._task = self._bar.add_task(f"step {start}/{steps}", total=steps, completed=start)

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        bits_per_byte: float | None = None,
        tokens_per_second: float | None = None,
        solved: float | None = None,
        puzzles_per_second: float | None = None,
        accuracy: float | None = None,
        examples_per_second: float | None = None,
    ) -> None:
        """Shows how far the run is.

        Args:
          step: updates made.
          loss: in nats per token.
          bits_per_byte: the same in bits per byte of text.
          tokens_per_second: training speed.
          solved: share of the puzzles that have halted.
          puzzles_per_second: training speed, a segment each.
          accuracy: share of the examples that are classified right.
          examples_per_second: training speed.
        """
        parts = [f"step {step}/{self._steps}"]
        if loss is not None:
            parts.append(f"loss {loss:.3f}")
        if bits_per_byte is not None:
            parts.append(f"{bits_per_byte:.3f} bits/byte")
        if tokens_per_second is not None:
            parts.append(f"{_count(tokens_per_second)} tokens/s")
        if solved is not None:
            parts.append(f"{solved:.1%} solved")
        if puzzles_per_second is not None:
            parts.append(f"{_count(puzzles_per_second)} puzzles/s")
        if accuracy is not None:
            parts.append(f"{accuracy:.1%} right")
        if examples_per_second is not None:
            parts.append(f"{_count(examples_per_second)} examples/s")
        if step > self._start:
            pace = (self._clock() - self._begin) / (step - self._start)
            parts.append(f"{_duration(pace * (self._steps - step))} left")
        text = "  ".join(parts)
        if self._bar is None:
            self.note(text)
        else:
            self._bar.update(self._task, completed=step, description=text)

    def note(self, text: str) -> None:
        """Prints a line that stays, above the bar if there is one."""
        self._console.print(text, markup=False)

    def __enter__(self) -> "RunProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()


def _count(number: float) -> str:
    """1234567 as 1.23M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    """Seconds as 0:07, 3:25 or 2:03:25."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
