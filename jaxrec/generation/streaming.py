"""Tokens as text, piece by piece, with stop strings and a report of how it went."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

from jax import Array

from jaxrec.generation.autoregressive import STOPPED, generate
from jaxrec.generation.sampling import SamplingConfig
from jaxrec.generation.stopping import StopStrings
from jaxrec.models.protocol import LanguageModel

Finish = Literal["length", "stop token", "stop string"]


class Decoder(Protocol):
    """Turns the tokens of one row into text; may hold back half a character."""

    def push(self, index: int) -> str:
        """Takes one token and returns the text that is now complete."""
        ...

    def flush(self) -> str:
        """Returns what was held back."""
        ...


@dataclasses.dataclass(frozen=True)
class Report:
    """How a generation went."""

    tokens: tuple[int, ...]  # drawn for each row, those of a stop string included
    finish: tuple[Finish, ...]  # why each row ended
    first_token_seconds: float  # from the start to the first token; includes compiling
    tokens_per_second: (
        float | None
    )  # all rows together, after the first token; None if there was but one


class TextStream:
    """An iterator of (row, piece of text); `report` is there once it has ended."""

    def __init__(self, rows: list["_Row"], steps: Iterator[Sequence[Sequence[int]]]) -> None:
        self.report: Report | None = None
        self._pieces = self._run(rows, steps)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self._pieces

    def __next__(self) -> tuple[int, str]:
        return next(self._pieces)

    def _run(
        self, rows: list["_Row"], steps: Iterator[Sequence[Sequence[int]]]
    ) -> Iterator[tuple[int, str]]:
        times = [time.perf_counter()]
        for step in steps:
            times.append(time.perf_counter())
            for index, row in enumerate(rows):
                for token in step[index]:
                    if row.finish is None and (text := row.push(token)):
                        yield index, text
            if all(row.finish for row in rows):
                break
        for index, row in enumerate(rows):
            if row.finish is None and (text := row.end("length")):
                yield index, text
        later_tokens = sum(max(row.tokens - 1, 0) for row in rows)
        self.report = Report(
            tokens=tuple(row.tokens for row in rows),
            finish=tuple(row.finish or "length" for row in rows),
            first_token_seconds=times[1] - times[0],
            tokens_per_second=later_tokens / (times[-1] - times[1]) if later_tokens else None,
        )


def stream_text(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    decoder: Callable[[], Decoder],
    max_new_tokens: int,
    stop_strings: Sequence[str] = (),
    config: SamplingConfig | None = None,
    key: Array | None = None,
    depth: int | None = None,
    latent_key: Array | None = None,
    stop_tokens: Sequence[int] = (),
    read_twice: bool = False,
) -> TextStream:
    """Continues prompts and gives the text of every row as it comes, without the prompt.

    Args:
      model: a language model.
      prompts: token ids of each row.
      decoder: makes the decoder of one row, such as `lambda: StreamDecoder(tokenizer)`.
      max_new_tokens: number of tokens after the prompt, >= 1.
      stop_strings: a row ends before the first of these to become complete in its continuation.
      config: see `generate`, as for all that follow.
      key: randomness of the draws.
      depth: loops of a looped model.
      latent_key: randomness of a looped model's initial latent state.
      stop_tokens: a row ends before any of these.
      read_twice: every prompt is read a second time after itself.

    Raises:
      UserError: as for `generate`, or a stop string is empty.
    """
    steps = generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        config=config,
        key=key,
        depth=depth,
        latent_key=latent_key,
        stop_tokens=stop_tokens,
        read_twice=read_twice,
    )
    one_by_one = ([[int(token)] for token in step] for step in steps)
    return text_of(one_by_one, len(prompts), decoder=decoder, stop_strings=stop_strings)


def text_of(
    steps: Iterator[Sequence[Sequence[int]]],
    rows: int,
    *,
    decoder: Callable[[], Decoder],
    stop_strings: Sequence[str] = (),
) -> TextStream:
    """The text of tokens that come in steps, for each row any number of them, `STOPPED` where the
    row has ended before the length.
    """
    return TextStream([_Row(decoder(), StopStrings(stop_strings)) for _ in range(rows)], steps)


class _Row:
    """The text of one row so far."""

    def __init__(self, decoder: Decoder, stop: StopStrings) -> None:
        self.tokens = 0
        self.finish: Finish | None = None
        self._decoder, self._stop = decoder, stop

    def push(self, token: int) -> str:
        """Takes the next token; returns the text that may be shown."""
        if token == STOPPED:
            return self.end("stop token")
        self.tokens += 1
        text, stopped = self._stop.push(self._decoder.push(token))
        self.finish = "stop string" if stopped else None
        return text

    def end(self, finish: Finish) -> str:
        """Returns all that was held back, as no token follows."""
        text, stopped = self._stop.push(self._decoder.flush())
        self.finish = "stop string" if stopped else finish
        return text + self._stop.flush()
