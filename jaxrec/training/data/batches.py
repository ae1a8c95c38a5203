"""Batches as a function of (seed, step): nothing to save, the same on any number of hosts.

The stream is cut into windows of t inputs and the t tokens that follow each: window w has the
inputs tokens[w t : w t + t] and the labels tokens[w t + 1 : w t + t + 1]. Each epoch visits every
window once in an order of its own (a grain MapDataset, shuffled and repeated), so row r of step s
is element s b + r of one endless list, whoever asks for it.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from itertools import count
from typing import Any, TypeVar, cast

import numpy as np

from jaxrec.errors import UserError
from jaxrec.training.data.streams import TokenStream

IGNORED = -100  # a label that does not count
LIMIT = 600.0  # seconds that a batch is waited for

HostBatch = dict[str, np.ndarray]
Rows = slice | tuple[int, int]
T = TypeVar("T")


class Batches:
    """Step-indexed batches of windows: `batches(step)` is a dictionary of int32 arrays.

    - `inputs`, (b t): token ids.
    - `labels`, (b t): the next token of each, or -100 where that belongs to another document.
    - `segment_ids`, (b t): 1, 2, ... by the documents inside the window, 0 for padding.

    So every token that follows another of its document is a label exactly once per epoch. The last
    window of the stream is padded (segment 0, label -100).

    Attributes:
      batch, time: rows and tokens of the global batch.
      num_windows: windows per epoch.
      num_batches: batches per epoch, the last one counted whole.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        batch: int,
        time: int,
        seed: int = 0,
        shuffle: bool = True,
        max_windows: int | None = None,
    ) -> None:
        """Lays windows over a stream.

        Args:
          stream: the tokens.
          batch: rows of the global batch, b.
          time: tokens per row, t.
          seed: order of the windows, 0 to 2**32 - 1.
          shuffle: True: endless, in a new order each epoch. False: one pass in the order of the
            stream, for evaluation; steps 0 to num_batches - 1, the last one filled up with padding.
          max_windows: use only this many windows, spread evenly over the stream: a quick evaluation
            that still sees all kinds of text. None: all.

        Raises:
          UserError: a size is below 1, the seed out of range, or the stream shorter than one window
            (when not shuffled: shorter than two tokens).
        """
        for name, value in (("batch", batch), ("time", time), ("max_windows", max_windows)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1; got {value}.")
        if not 0 <= seed < 2**32:
            raise UserError(f"The data seed must be in 0 .. 2**32 - 1; got {seed}.")
        tokens = len(stream.tokens)
        if tokens < (time + 1 if shuffle else 2):
            needed = f"one window needs {time + 1} (a context of {time} and the token after it)"
            raise UserError(
                f"The {'training' if shuffle else 'evaluation'} text has {tokens} tokens; "
                f"{needed if shuffle else 'at least 2 are needed'}."
                " Give more text or a shorter context."
            )
        self.batch, self.time = batch, time
        self._tokens = np.asarray(stream.tokens)  # of a memory map, a view that indexes faster
        self._starts = stream.starts
        self._shuffle = shuffle
        windows = -(-(tokens - 1) // time)
        self.num_windows = min(windows, max_windows or windows)
        self.num_batches = -(-self.num_windows // batch)
        self._total = windows
        self._order = _shuffled(self.num_windows, seed) if shuffle else None

    def __call__(self, step: int, rows: Rows = slice(None)) -> HostBatch:
        """Returns the batch of a step, or these rows of it: slice(start, stop) or (start, stop).

        Raises:
          IndexError: the step is negative, or beyond the end of an unshuffled pass.
        """
        if step < 0 or (not self._shuffle and step >= self.num_batches):
            raise IndexError(f"step {step} is not in 0 .. {self.num_batches - 1}")
        rows = rows if isinstance(rows, slice) else slice(*rows)
        elements = step * self.batch + np.arange(self.batch)[rows]
        if self._order is not None:
            chosen = np.array([self._order(int(element)) for element in elements], np.int64)
        else:
            chosen = elements
        windows = chosen * self._total // self.num_windows  # the identity when all are used
        return self._gather(np.where(chosen < self.num_windows, windows, self._total))

    def _gather(self, windows: np.ndarray) -> HostBatch:
        """The windows of these numbers, (b,) int64; numbers beyond the last are all padding."""
        count = len(self._tokens)
        begin = windows[:, None] * self.time  # (b 1)
        position = begin + np.arange(self.time + 1)  # (b t+1)
        real = position[:, 1:] < count  # inputs that have a next token
        tokens = self._tokens[np.minimum(position, count - 1)].astype(np.int32)
        document = np.searchsorted(self._starts, position, side="right")
        segment = (document - document[:, :1] + 1).astype(np.int32)
        same = real & (segment[:, 1:] == segment[:, :-1])
        return {
            "inputs": np.where(real, tokens[:, :-1], 0),
            "labels": np.where(same, tokens[:, 1:], np.int32(IGNORED)),
            "segment_ids": np.where(real, segment[:, :-1], 0),
        }


def prefetch(
    batches: Callable[[int, Any], T],
    start: int = 0,
    stop: int | None = None,
    rows: Rows = slice(None),
    depth: int = 2,
    limit: float = LIMIT,
) -> Generator[tuple[int, T], None, None]:
    """Yields (step, batch) for start <= step < stop while a thread makes the next `depth` batches.

    Closing the iterator, or leaving it, ends the thread. What `batches` raises is raised here, at
    its step.

    Args:
      batches: what makes the batch of a step, such as `Batches`.
      start: first step.
      stop: first step that is not made; None: never ends.
      rows: rows of each batch that this host needs.
      depth: batches made ahead.
      limit: seconds that one is waited for.

    Raises:
      UserError: a batch is not there after `limit`, as when a file system hangs. Its thread is left
        alone: it cannot be ended, and does not keep the process from ending.
    """
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def make() -> None:
        for step in _steps(start, stop):
            batch, error = None, None
            try:
                batch = batches(step, rows)
            except BaseException as raised:  # whatever it is, it belongs to who asks for the step
                error = raised
            while not closed.is_set():
                with contextlib.suppress(queue.Full):
                    made.put((batch, error), timeout=0.1)
                    break
            if error is not None or closed.is_set():
                return

    thread = threading.Thread(target=make, name="prefetch", daemon=True)
    thread.start()
    wait = limit
    try:
        for step in _steps(start, stop):
            try:
                batch, error = made.get(timeout=limit)
            except queue.Empty:
                wait = 0.0
                raise UserError(
                    f"The batch of step {step} was not there after {limit:.0f} s. Is the file"
                    " system of the data reachable? The same command goes on from the last"
                    " checkpoint."
                ) from None
            if error is not None:
                raise error
            yield step, cast(T, batch)
    finally:
        closed.set()
        thread.join(wait)


def _steps(start: int, stop: int | None) -> Iterable[int]:
    return count(start) if stop is None else range(start, stop)


def _shuffled(num_windows: int, seed: int) -> Callable[[int], int]:
    """The endless list of window numbers, reshuffled each epoch, as a function of the position."""
    import grain  # brings jax along; only batches need it

    order = grain.MapDataset.range(num_windows).seed(seed).shuffle().repeat()
    return order.__getitem__
