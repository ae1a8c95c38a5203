"""ARC: tasks of coloured grids, their variants, and votes of a task's variants on its answer.

A grid is an integer array (x y) of colours 0 .. 9, at most 30 x 30. A model reads it inside 30 x 30
tokens: colour + 2, END in the row below and in the column right of it, PAD elsewhere. A task is
augmented by one of eight symmetries and a permutation of the colours other than 0; each variant has
a vector, and a name from which it can be undone.

Chollet, On the measure of intelligence (2019), arXiv:1911.01547; Wang et al., Hierarchical
reasoning model (2025), arXiv:2506.21734, section 3.2.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrec.config import read_json
from jaxrec.errors import UserError
from jaxrec.models.hrm import Rows
from jaxrec.training.data.puzzle_folders import BLANK
from jaxrec.training.data.puzzles import DIHEDRAL_INVERSE, PuzzleSet, dihedral

SIZE = 30
COLOURS = 10
PAD, END, FIRST_COLOUR = 0, 1, 2
VOCABULARY = FIRST_COLOUR + COLOURS
TRIES = 5
"""So many variants are drawn for each one wanted, as some are the same."""


class Pair(NamedTuple):
    """A question and its answer."""

    question: np.ndarray  # uint8 (x y)
    answer: np.ndarray | None  # uint8 (x y); None if it is kept secret


class Task(NamedTuple):
    """What is to be found out from a few pairs and then done to others."""

    name: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]


class Augmentation(NamedTuple):
    """A symmetry, and then a permutation of colours."""

    symmetry: int  # see `puzzles.dihedral`
    colours: np.ndarray  # (10): what becomes of a colour

    def __call__(self, grid: np.ndarray) -> np.ndarray:
        """Maps a grid."""
        return self.colours[dihedral(grid, self.symmetry)].astype(np.uint8)

    def undo(self, grid: np.ndarray) -> np.ndarray:
        """Maps it back."""
        colours = np.argsort(self.colours).astype(np.uint8)
        return colours[dihedral(grid, DIHEDRAL_INVERSE[self.symmetry])]

    def name_of(self, task: str) -> str:
        """The name of a task's variant, as published."""
        return f"{task}_t{self.symmetry}_{''.join(map(str, self.colours))}"


class ArcSets(NamedTuple):
    """Tasks and variants, ready for `puzzle_folders.write_split` and for training."""

    train: PuzzleSet
    test: PuzzleSet | None  # None if no task has anything to test
    names: list[str]  # of the vectors; the first one belongs to no puzzle


def read_tasks(folder: str | Path) -> list[Task]:
    """Reads all *.json of a folder, a task each, in the order of their names.

    A task is {"train": [{"input": grid, "output": grid}, ...], "test": [...]}; the test may do
    without outputs.

    Raises:
      UserError: there are no such files, or one is no task; the message names it.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"{folder} holds no *.json; expected a folder of ARC tasks.")
    return [_task(file) for file in files]


def to_tokens(grid: np.ndarray, offset: tuple[int, int] = (0, 0)) -> np.ndarray:
    """A grid's tokens, uint8 (900), with its first cell at an offset.

    Raises:
      ValueError: the grid leaves the 30 x 30.
    """
    (top, left), (bottom, right) = offset, np.add(grid.shape, offset)
    if min(offset) < 0 or max(bottom, right) > SIZE:
        raise ValueError(
            f"ARC: a grid of {grid.shape} at {offset} leaves the {SIZE} x {SIZE} tokens."
        )
    tokens = np.full((SIZE + 1, SIZE + 1), PAD, np.uint8)
    tokens[bottom, left:right] = tokens[top:bottom, right] = END
    tokens[top:bottom, left:right] = grid + FIRST_COLOUR
    return tokens[:SIZE, :SIZE].reshape(-1)


def to_grid(tokens: np.ndarray) -> np.ndarray:
    """The largest grid, uint8 (x y), whose first cell is the first of tokens (900): what a model
    has answered, however it has ended it.
    """
    tokens = tokens.reshape(SIZE, SIZE)
    colour = (tokens >= FIRST_COLOUR) & (tokens < VOCABULARY)
    widths = np.minimum.accumulate(np.sum(np.logical_and.accumulate(colour, axis=1), axis=1))
    height = int(np.argmax(widths * np.arange(1, SIZE + 1))) + 1
    return (tokens[:height, : widths[height - 1]] - FIRST_COLOUR).astype(np.uint8)


def augmentation(rng: np.random.Generator) -> Augmentation:
    """Draws one."""
    return Augmentation(
        int(rng.integers(len(DIHEDRAL_INVERSE))),
        np.concatenate([[0], 1 + rng.permutation(COLOURS - 1)]),
    )


def parse_name(name: str) -> tuple[str, Augmentation]:
    """Task and augmentation of a variant's name; those of other names change nothing."""
    found = re.fullmatch(r"(.+)_t([0-7])_([0-9]{10})", name)
    if found is None or len(set(found[3])) < COLOURS:
        return name, Augmentation(0, np.arange(COLOURS))
    return found[1], Augmentation(int(found[2]), np.array([int(c) for c in found[3]]))


def augment(task: Task, count: int, rng: np.random.Generator) -> list[Task]:
    """The task and up to `count` variants, all different."""
    variants, seen = [task], {_content(task)}
    for _ in range(TRIES * count):
        if len(variants) > count:
            break
        change = augmentation(rng)
        variant = Task(
            change.name_of(task.name),
            *(tuple(_changed(pair, change) for pair in pairs) for pairs in task[1:]),
        )
        content = _content(variant)
        if content not in seen:
            seen.add(content)
            variants.append(variant)
    return variants


def puzzle_sets(
    training: Sequence[Task],
    evaluation: Sequence[Task],
    *,
    augmentations: int = 1000,
    seed: int = 0,
) -> ArcSets:
    """Makes the sets that a model is trained and tested on.

    All pairs of training tasks, and those of evaluation tasks that show what to do, are trained on;
    the others of evaluation tasks are tested. In training all pairs of a variant but one, drawn at
    random, stand at a random place of the 30 x 30.

    Args:
      training: tasks.
      evaluation: tasks.
      augmentations: variants of each task, beside itself.
      seed: of NumPy's `default_rng`, together with the number of the task.

    Raises:
      ValueError: two tasks have the same name, there is nothing to train on, or a pair that is to
        be trained on has no answer.
    """
    tasks = [*training, *evaluation]
    if len({task.name for task in tasks}) != len(tasks):
        raise ValueError("ARC: tasks must have different names.")
    names = [BLANK]
    train, test = _Builder(), _Builder()
    for number, task in enumerate(tasks):
        rng = np.random.default_rng([seed, number])
        for variant in augment(task, augmentations, rng):
            shown, asked = variant.train, variant.test
            if number < len(training):
                shown, asked = shown + asked, ()
            train.add(len(names), _scattered(task.name, shown, rng))
            test.add(len(names), [_example(pair, (0, 0)) for pair in asked])
            names.append(variant.name)
        train.end_group()
        test.end_group()
    if not train.examples:
        raise ValueError("ARC: there is no pair to train on.")
    return ArcSets(train.build(), test.build() if test.examples else None, names)


class Votes:
    """What the variants of tasks have answered, put together."""

    def __init__(self, names: Sequence[str]) -> None:
        """Begins to count.

        Args:
          names: of the vectors, from `ArcSets` or `puzzle_folders.read_identifiers`.
        """
        self._variants = [parse_name(name) for name in names]
        self._ballots: dict[tuple[str, bytes], dict[bytes, _Ballot]] = {}

    def add(self, rows: Rows[np.ndarray], answers: np.ndarray, q: np.ndarray) -> None:
        """Counts the answers to a batch.

        Args:
          rows: the questions; rows of vector 0 fill up the batch and do not count.
          answers: tokens (b 900).
          q: how sure the model is of each (b), such as sigmoid(q_halt).

        Raises:
          ValueError: a row's vector has no name.
        """
        if rows.puzzle.max(initial=0) >= len(self._variants):
            raise ValueError(
                f"ARC: there are {len(self._variants)} names of vectors, got vector"
                f" {rows.puzzle.max()}."
            )
        for tokens, puzzle, answer, sure in zip(rows.tokens, rows.puzzle, answers, q, strict=True):
            if puzzle == 0:
                continue
            task, change = self._variants[puzzle]
            grid = change.undo(to_grid(answer))
            question = _key(change.undo(to_grid(tokens)))
            ballots = self._ballots.setdefault((task, question), {})
            before = ballots.get(_key(grid), _Ballot(grid, 0, 0.0))
            ballots[_key(grid)] = _Ballot(grid, before.votes + 1, before.q + float(sure))

    def attempts(self, task: str, question: np.ndarray, count: int = 2) -> list[np.ndarray]:
        """The answers to a question that have most votes, the surest first among equals."""
        ballots = self._ballots.get((task, _key(question)), {}).values()
        ranked = sorted(ballots, key=lambda x: (x.votes, x.q / x.votes), reverse=True)
        return [ballot.grid for ballot in ranked[:count]]

    def score(self, tasks: Iterable[Task], count: int = 2) -> float:
        """Mean over tasks of the share of their tests of which an attempt is right.

        Raises:
          ValueError: there is no task, or one has no test or keeps its answer secret.
        """
        shares = []
        for task in tasks:
            answers = [pair.answer for pair in task.test if pair.answer is not None]
            if not answers or len(answers) < len(task.test):
                raise ValueError(f"ARC: the task {task.name} has no answers to compare with.")
            right = [
                any(np.array_equal(attempt, answer) for attempt in attempts)
                for answer, attempts in zip(
                    answers,
                    (self.attempts(task.name, pair.question, count) for pair in task.test),
                    strict=True,
                )
            ]
            shares.append(float(np.mean(right)))
        if not shares:
            raise ValueError("ARC: there is no task to score.")
        return float(np.mean(shares))


class _Ballot(NamedTuple):
    grid: np.ndarray
    votes: int
    q: float  # sum


class _Builder:
    """Puts a set together, puzzle by puzzle."""

    def __init__(self) -> None:
        self.examples: list[tuple[np.ndarray, np.ndarray]] = []
        self._identifiers: list[int] = []
        self._puzzles, self._groups = [0], [0]

    def add(self, identifier: int, examples: list[tuple[np.ndarray, np.ndarray]]) -> None:
        if examples:
            self.examples += examples
            self._identifiers.append(identifier)
            self._puzzles.append(len(self.examples))

    def end_group(self) -> None:
        if len(self._identifiers) > self._groups[-1]:
            self._groups.append(len(self._identifiers))

    def build(self) -> PuzzleSet:
        inputs, labels = zip(*self.examples, strict=True)
        bounds = (self._identifiers, self._puzzles, self._groups)
        return PuzzleSet(
            np.stack(inputs), np.stack(labels), *(np.array(x, np.int32) for x in bounds)
        )


def _scattered(
    task: str, pairs: Sequence[Pair], rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs as tokens, all but one at a random offset, the same for question and answer."""
    examples = []
    fixed = int(rng.integers(max(len(pairs), 1)))
    for i, pair in enumerate(pairs):
        if pair.answer is None:
            raise ValueError(f"ARC: a pair of {task} that is to be trained on has no answer.")
        room = SIZE - np.maximum(pair.question.shape, pair.answer.shape)
        top, left = rng.integers(0, room + 1).tolist()
        examples.append(_example(pair, (0, 0) if i == fixed else (top, left)))
    return examples


def _example(pair: Pair, offset: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    question = to_tokens(pair.question, offset)
    if pair.answer is None:
        return question, np.full_like(question, PAD)
    return question, to_tokens(pair.answer, offset)


def _changed(pair: Pair, change: Augmentation) -> Pair:
    return Pair(change(pair.question), None if pair.answer is None else change(pair.answer))


def _key(grid: np.ndarray) -> bytes:
    """Tells grids of all shapes apart."""
    return bytes(grid.shape) + grid.astype(np.uint8).tobytes()


def _content(task: Task) -> bytes:
    """Tells tasks apart by their pairs, whatever their order."""
    pairs = [
        _key(pair.question) + (b"" if pair.answer is None else _key(pair.answer))
        for pair in task.train + task.test
    ]
    return b"".join(sorted(pairs))


def _task(file: Path) -> Task:
    values = read_json(file)
    parts = {}
    for part in ("train", "test"):
        pairs = values.get(part) if isinstance(values, dict) else None
        if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
            raise UserError(f"{file} must hold a list of pairs, {part!r}.")
        read = []
        for i, pair in enumerate(pairs):
            place = f"{file}, {part} pair {i + 1}"
            secret = part == "test" and "output" not in pair
            read.append(
                Pair(
                    _grid(place, pair, "input"),
                    None if secret else _grid(place, pair, "output"),
                )
            )
        parts[part] = tuple(read)
    return Task(file.stem, parts["train"], parts["test"])


def _grid(place: str, pair: dict[str, Any], name: str) -> np.ndarray:
    rows = pair.get(name)
    if (
        not isinstance(rows, list)
        or not 1 <= len(rows) <= SIZE
        or not all(isinstance(row, list) and 1 <= len(row) <= SIZE for row in rows)
        or len({len(row) for row in rows}) != 1
    ):
        raise UserError(
            f"{place}: {name!r} must be 1 .. {SIZE} rows of equally many, 1 .. {SIZE}, colours."
        )
    colours = [colour for row in rows for colour in row]
    odd = [x for x in colours if type(x) is not int or x not in range(COLOURS)]
    if odd:
        raise UserError(f"{place}: colours of {name!r} are 0 .. {COLOURS - 1}, got {odd[0]!r}.")
    return np.array(rows, np.uint8)
