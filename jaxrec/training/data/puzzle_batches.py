"""Batches of puzzles as a function of (seed, step).

Every epoch visits each group of a set once, in random order, and takes the examples of one of its
puzzles. Puzzles follow each other until a batch is full; of the last one only as many examples as
fit are taken, drawn without replacement. A few epochs together make up an iteration, whose last
batch is dropped when it is not full; sets take turns, an iteration each.

The groups and puzzles of iteration i = 0, 1, ... are those of the published code, from Philox with
the seed `seed + 1 + i`; which examples of a puzzle are taken it does not say, as it draws them from
a generator without a seed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrec.errors import UserError
from jaxrec.models.hrm import Rows
from jaxrec.training.data.batches import IGNORED
from jaxrec.training.data.puzzles import PuzzleSet


class Plan(NamedTuple):
    """The puzzles of an iteration in their order, and where its batches begin."""

    puzzles: np.ndarray  # int64 (visits)
    begins: list[int]  # batch k takes from puzzles[begins[k] : begins[k + 1]]


class GroupBatches:
    """Endless batches for training: `batches(step)` gives `Rows` of the global batch."""

    def __init__(
        self,
        sets: Sequence[PuzzleSet],
        *,
        batch: int,
        seed: int = 0,
        epochs: int = 1,
        ignored_label: int | None = 0,
    ) -> None:
        """Prepares to draw from sets.

        Args:
          sets: take turns.
          batch: rows of the global batch, b.
          seed: see the module.
          epochs: make up an iteration; small sets need several to fill a batch.
          ignored_label: label that becomes IGNORED; None if none does.

        Raises:
          UserError: a number is out of range, there is no set, or one cannot fill a batch.
        """
        for name, value, least in (("batch", batch, 1), ("epochs", epochs, 1), ("seed", seed, 0)):
            if value < least:
                raise UserError(f"{name} must be at least {least}; got {value}.")
        if not sets:
            raise UserError("Batches of puzzles need at least one set.")
        self.batch = batch
        self._sets, self._seed, self._epochs = list(sets), seed, epochs
        self._ignored = ignored_label
        self._sizes = [np.diff(each.puzzle_indices.astype(np.int64)) for each in self._sets]
        # Of sets whose puzzles all have the same number of examples, that number.
        self._common = [
            int(sizes[0]) if np.all(sizes == sizes[0]) else None for sizes in self._sizes
        ]
        for each, sizes in zip(self._sets, self._sizes, strict=True):
            groups = each.group_indices[:-1].astype(np.int64)
            least = epochs * int(np.minimum.reduceat(sizes, groups).sum())
            if least < batch:
                raise UserError(
                    f"A batch of {batch} is more than the {least} examples that {epochs} epochs of"
                    f" {len(groups)} groups are sure to have. Ask for a smaller"
                    " batch or for more epochs together."
                )
        self._first_steps = [0]  # of iteration 0, 1, ... as far as known
        self._last: tuple[int, Plan] | None = None

    def __call__(self, step: int, rows: slice | tuple[int, int] = slice(None)) -> Rows[np.ndarray]:
        """Returns the batch of a step, or these rows of it: slice(start, stop) or (start, stop).

        A first call at a late step counts the batches of all iterations before, which is instant
        when all puzzles of a set have the same number of examples, and else takes less than a
        second for a million groups visited.

        Raises:
          IndexError: the step is negative.
        """
        if step < 0:
            raise IndexError(f"step {step} is negative")
        while self._first_steps[-1] <= step:
            self._first_steps.append(
                self._first_steps[-1] + self._count(len(self._first_steps) - 1)
            )
        iteration = int(np.searchsorted(self._first_steps, step, side="right")) - 1
        which = iteration % len(self._sets)
        batch_of_iteration = step - self._first_steps[iteration]
        puzzles, examples = self._examples(iteration, batch_of_iteration)
        rows = rows if isinstance(rows, slice) else slice(*rows)
        return _gather(self._sets[which], puzzles[rows], examples[rows], self._ignored)

    def _count(self, iteration: int) -> int:
        """Batches of an iteration."""
        which = iteration % len(self._sets)
        size = self._common[which]
        if size is not None:
            groups = self._epochs * (len(self._sets[which].group_indices) - 1)
            return groups // -(-self.batch // size)
        return len(self._plan(iteration).begins) - 1

    def _plan(self, iteration: int) -> Plan:
        if self._last is not None and self._last[0] == iteration:
            return self._last[1]
        which = iteration % len(self._sets)
        bounds = np.asarray(self._sets[which].group_indices, np.int64)
        rng = np.random.Generator(np.random.Philox(seed=self._seed + 1 + iteration))
        order = np.concatenate([rng.permutation(len(bounds) - 1) for _ in range(self._epochs)])
        puzzles = rng.integers(bounds[order], bounds[order + 1])
        ends = np.cumsum(self._sizes[which][puzzles], dtype=np.int64)
        begins, before = [0], 0
        while (last := int(np.searchsorted(ends, before + self.batch))) < len(ends):
            begins.append(last + 1)
            before = int(ends[last])
        self._last = iteration, Plan(puzzles, begins)
        return self._last[1]

    def _examples(self, iteration: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Puzzle and example of each row, int64 (b)."""
        plan = self._plan(iteration)
        which = iteration % len(self._sets)
        puzzles = plan.puzzles[plan.begins[batch] : plan.begins[batch + 1]]
        begins = np.asarray(self._sets[which].puzzle_indices, np.int64)[puzzles]
        sizes = self._sizes[which][puzzles]
        if sizes.max() > 1:
            rng = np.random.default_rng([self._seed, iteration, batch])
            drawn = [
                begin + rng.permutation(size) for begin, size in zip(begins, sizes, strict=True)
            ]
            begins = np.concatenate(drawn)
        return np.repeat(puzzles, sizes)[: self.batch], begins[: self.batch]


class OrderedBatches:
    """One pass over a set in its order, for evaluation; the last batch is padded.

    Attributes:
      num_batches: batches of the pass, the last one counted whole.
      count: examples of the pass.
    """

    def __init__(
        self,
        puzzles: PuzzleSet,
        *,
        batch: int,
        ignored_label: int | None = 0,
        pad: int = 0,
        blank: int = 0,
    ) -> None:
        """Prepares a pass.

        Args:
          puzzles: the set; row r of step s is example s b + r.
          batch: rows of the global batch, b.
          ignored_label: label that becomes IGNORED; None if none does.
          pad: token of the rows beyond the last example, whose labels are all IGNORED.
          blank: vector of these rows.

        Raises:
          UserError: the batch is empty.
        """
        if batch < 1:
            raise UserError(f"batch must be at least 1; got {batch}.")
        self.batch = batch
        self.count = len(puzzles.inputs)
        self.num_batches = -(-self.count // batch)
        self._puzzles, self._ignored, self._pad, self._blank = puzzles, ignored_label, pad, blank

    def __call__(self, step: int, rows: slice | tuple[int, int] = slice(None)) -> Rows[np.ndarray]:
        """Returns the batch of a step, or these rows of it: slice(start, stop) or (start, stop).

        Raises:
          IndexError: the step is negative, or beyond the end.
        """
        if not 0 <= step < self.num_batches:
            raise IndexError(f"step {step} is not in 0 .. {self.num_batches - 1}")
        rows = rows if isinstance(rows, slice) else slice(*rows)
        examples = step * self.batch + np.arange(self.batch)[rows]
        real = examples < len(self._puzzles.inputs)
        examples = np.where(real, examples, 0)
        puzzles = np.searchsorted(self._puzzles.puzzle_indices, examples, side="right") - 1
        found = _gather(self._puzzles, puzzles, examples, self._ignored)
        return Rows(
            np.where(real[:, None], found.tokens, np.int32(self._pad)),
            np.where(real[:, None], found.labels, np.int32(IGNORED)),
            np.where(real, found.puzzle, np.int32(self._blank)),
        )


def _gather(
    puzzles: PuzzleSet, which: np.ndarray, examples: np.ndarray, ignored: int | None
) -> Rows[np.ndarray]:
    labels = puzzles.labels[examples].astype(np.int32)
    if ignored is not None:
        labels[labels == ignored] = IGNORED
    return Rows(
        puzzles.inputs[examples].astype(np.int32),
        labels,
        puzzles.puzzle_identifiers[which].astype(np.int32),
    )
