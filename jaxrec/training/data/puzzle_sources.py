"""From the name of puzzles to sets of them: made ones, folders of ARC tasks, published folders.

Made puzzles are a function of the configuration: a run that goes on makes them again.
"""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrec.errors import UserError, nearest
from jaxrec.training.config import PuzzleDataConfig
from jaxrec.training.data import arc, mazes, sudoku
from jaxrec.training.data.puzzle_batches import GroupBatches, OrderedBatches
from jaxrec.training.data.puzzle_folders import (
    DESCRIPTION,
    IDENTIFIERS,
    read_identifiers,
    read_split,
)
from jaxrec.training.data.puzzles import PuzzleSet, joined, spread

SUDOKUS = tuple(f"sudoku-{n}x{n}" for n in sudoku.BOXES)
MAZE = re.compile(r"maze-([0-9]+)x([0-9]+)")
COPIES = {"sudoku": 20, "maze": 7, "arc": 20}
"""Of each puzzle beside itself, where the configuration does not say."""
CLUES = {4: (8, 10)}
"""Of a made Sudoku by its size, where the configuration does not say; as few as possible of others.
"""
TRIED = 20
"""So many times as many puzzles as are to be held out are made before it says that they are all in
training."""


class Look(NamedTuple):
    """How a row of tokens is shown as a grid."""

    shape: tuple[int, int]
    symbols: str  # by token
    open: int | None  # token of a question's cells that are to be filled in; None: all cells are


class PuzzleData(NamedTuple):
    """What a solver is trained and judged on."""

    train: list[PuzzleSet]  # take turns
    valid: PuzzleSet
    vocabulary: int
    length: int
    identifiers: int  # vectors of puzzles
    ignored_label: int | None
    pad: int  # token of the rows that fill up a batch
    blank: int  # vector of these rows
    look: Look
    provenance: dict[str, Any]  # source, sha256, and how many there are; values that JSON can hold
    names: list[str] | None = None  # of vectors, and the tasks that are asked: of ARC only
    tasks: list[arc.Task] | None = None

    def batches(self, batch: int, seed: int, epochs: int | None = None) -> GroupBatches:
        """Batches to learn from, cut from so many epochs joined; None: as few as fill one.

        Raises:
          UserError: the batch is empty, or so many epochs do not fill it.
        """
        if epochs is None:
            sure = min(
                int(np.minimum.reduceat(np.diff(x.puzzle_indices), x.group_indices[:-1]).sum())
                for x in self.train
            )
            epochs = max(1, -(-batch // sure))
        return GroupBatches(
            self.train, batch=batch, seed=seed, epochs=epochs, ignored_label=self.ignored_label
        )

    def held_out(self, batch: int, count: int | None = None) -> OrderedBatches:
        """A pass over the held-out puzzles, or so many of them from all over."""
        puzzles = self.valid
        if count is not None and count < len(puzzles.inputs):
            puzzles = spread(puzzles, count)
        return OrderedBatches(
            puzzles,
            batch=batch,
            ignored_label=self.ignored_label,
            pad=self.pad,
            blank=self.blank,
        )


def are_puzzles(source: str) -> bool:
    """Whether a source can be nothing but puzzles: the name of made ones, or a published folder."""
    made = source in SUDOKUS or MAZE.fullmatch(source) is not None
    return made or (Path(source).expanduser() / "train" / DESCRIPTION).exists()


def made_size(source: str) -> tuple[int, int] | None:
    """Places and tokens of puzzles that are made; None for those of a folder."""
    if source in SUDOKUS:
        side = int(source[-1])
        return side * side, sudoku.vocabulary(side)
    found = MAZE.fullmatch(source)
    return None if found is None else (int(found[1]) * int(found[2]), mazes.VOCABULARY)


def made_like(length: int, vocabulary: int) -> str | None:
    """The name of made puzzles of so many places and tokens; None if there are none."""
    side = round(length**0.5)
    if side * side != length:
        return None
    if side in sudoku.BOXES and vocabulary == sudoku.vocabulary(side):
        return f"sudoku-{side}x{side}"
    return f"maze-{side}x{side}" if vocabulary == mazes.VOCABULARY else None


def load_puzzles(config: PuzzleDataConfig) -> PuzzleData:
    """Makes or reads puzzles to learn from and puzzles that are held out.

    Raises:
      UserError: there is no such source, it cannot be made as asked, or a folder is damaged.
    """
    try:
        return _load(config)
    except ValueError as error:  # what was asked for cannot be made
        raise UserError(str(error)) from error


def _load(config: PuzzleDataConfig) -> PuzzleData:
    source = config.source
    if source in SUDOKUS:
        return _sudokus(config, int(source[-1]))
    found = MAZE.fullmatch(source)
    if found is not None:
        return _mazes(config, int(found[1]), int(found[2]))
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"There are no puzzles {source!r}.{nearest(source, SUDOKUS)} Give"
            f" {', '.join(SUDOKUS)}, maze-NxN, a folder of ARC tasks, or a folder in the published"
            " format."
        )
    if (folder / "train" / DESCRIPTION).exists() or (folder / "test" / DESCRIPTION).exists():
        return _published(config, folder)
    if not any(folder.glob("*.json")) and not any(folder.glob("*/*.json")):
        raise UserError(
            f"{folder} holds no puzzles: neither train/{DESCRIPTION} nor ARC tasks"
            " (training/*.json and evaluation/*.json, or *.json)."
        )
    return _arc_tasks(config, folder)


def _sudokus(config: PuzzleDataConfig, size: int) -> PuzzleData:
    clues = config.clues or CLUES.get(size)

    def make(index: int) -> sudoku.Sudoku:
        return sudoku.make(size, seed=config.seed, index=index, clues=clues)

    def to_set(puzzles: list[sudoku.Sudoku], copies: int) -> PuzzleSet:
        return sudoku.puzzle_set(puzzles, augmentations=copies, seed=config.seed)

    copies = COPIES["sudoku"] if config.augmentations is None else config.augmentations
    return _made(config, copies, make, to_set, sudoku.vocabulary(size), _sudoku_look(size))


def _mazes(config: PuzzleDataConfig, height: int, width: int) -> PuzzleData:
    copies = COPIES["maze"] if height == width else 0
    if config.augmentations is not None:
        copies = config.augmentations
    if copies not in (0, 7):
        raise UserError(
            f"data.augmentations of mazes must be 0 or 7, got {copies}: a grid has seven copies,"
            " turned and mirrored."
        )

    def make(index: int) -> mazes.Maze:
        return mazes.make(height, width, seed=config.seed, index=index)

    def to_set(puzzles: list[mazes.Maze], copies: int) -> PuzzleSet:
        return mazes.puzzle_set(puzzles, symmetries=copies > 0)

    return _made(config, copies, make, to_set, mazes.VOCABULARY, _maze_look((height, width)))


def _made(
    config: PuzzleDataConfig,
    copies: int,
    make: Callable[[int], Any],
    to_set: Callable[[list[Any], int], PuzzleSet],
    vocabulary: int,
    look: Look,
) -> PuzzleData:
    train = to_set([make(index) for index in range(config.puzzles)], copies)
    taken = {question.tobytes() for question in train.inputs}

    def others() -> Iterator[Any]:
        for index in range(config.puzzles, config.puzzles + TRIED * config.held_out):
            puzzle = make(index)
            question = to_set([puzzle], 0).inputs[0].tobytes()
            if question not in taken:
                taken.add(question)
                yield puzzle

    held_out = list(itertools.islice(others(), config.held_out))
    if len(held_out) < config.held_out:
        raise UserError(
            f"Of {TRIED * config.held_out} more puzzles {config.source} only {len(held_out)} are"
            " not in training. Ask for fewer (--data.puzzles, --data.augmentations), or hold out"
            " fewer (--data.held-out)."
        )
    return _complete([train], to_set(held_out, 0), config, vocabulary, look)


def _complete(
    train: list[PuzzleSet],
    valid: PuzzleSet,
    config: PuzzleDataConfig,
    vocabulary: int,
    look: Look,
    *,
    identifiers: int = 1,
    ignored_label: int | None = 0,
    pad: int = 0,
    blank: int = 0,
    names: list[str] | None = None,
    tasks: list[arc.Task] | None = None,
) -> PuzzleData:
    digest = hashlib.sha256()
    for each in (*train, valid):
        for array in each:
            digest.update(np.ascontiguousarray(array).data)
    return PuzzleData(
        train,
        valid,
        vocabulary,
        valid.inputs.shape[1],
        identifiers,
        ignored_label,
        pad,
        blank,
        look,
        {
            "source": config.source,
            "sha256": digest.hexdigest(),
            "examples": sum(len(each.inputs) for each in train),
            "groups": sum(len(each.group_indices) - 1 for each in train),
            "held_out": len(valid.inputs),
        },
        names,
        tasks,
    )


def _published(config: PuzzleDataConfig, folder: Path) -> PuzzleData:
    train, test = read_split(folder / "train"), read_split(folder / "test")
    for field in ("vocab_size", "seq_len", "ignore_label_id"):
        here, there = (getattr(split.description, field) for split in (train, test))
        if here != there:
            raise UserError(
                f"{folder}: the {DESCRIPTION} of train and test must agree, but {field} is {here}"
                f" and {there}."
            )
    about = train.description
    identifiers = max(about.num_puzzle_identifiers, test.description.num_puzzle_identifiers)
    names, tasks = _arc_questions(folder, identifiers)
    return _complete(
        list(train.sets.values()),
        joined(list(test.sets.values())),
        config,
        about.vocab_size,
        _guess(about.vocab_size, about.seq_len),
        identifiers=identifiers,
        ignored_label=about.ignore_label_id,
        pad=about.pad_id,
        blank=about.blank_identifier_id,
        names=names,
        tasks=tasks,
    )


def _arc_questions(
    folder: Path, identifiers: int
) -> tuple[list[str] | None, list[arc.Task] | None]:
    """Names of the vectors and the tasks that are asked, where a published folder has
    identifiers.json and beside it, put there by the user, ARC's evaluation/*.json; else nothing.

    Raises:
      UserError: a file is damaged, or there are fewer names than vectors.
    """
    questions = folder / "evaluation"
    if not (folder / IDENTIFIERS).exists() or not questions.is_dir():
        return None, None
    names = read_identifiers(folder)
    if len(names) < identifiers:
        raise UserError(
            f"{folder / IDENTIFIERS} names {len(names)} vectors, but {DESCRIPTION} counts"
            f" {identifiers}; they are of different data. Fetch both again."
        )
    asked = {arc.parse_name(name)[0] for name in names}
    found = [task for task in arc.read_tasks(questions) if task.name in asked and _is_open(task)]
    return names, found


def _guess(vocabulary: int, length: int) -> Look:
    """How puzzles of a folder, which does not say what they are, are shown."""
    side = round(length**0.5)
    shape = (side, side) if side * side == length else (1, length)
    kind = made_like(length, vocabulary) or ""
    if kind.startswith("sudoku"):
        return _sudoku_look(side)
    if kind.startswith("maze"):
        return _maze_look(shape)
    if (length, vocabulary) == (arc.SIZE**2, arc.VOCABULARY):
        return _ARC_LOOK
    letters = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return Look(shape, (letters * (1 + vocabulary // len(letters)))[:vocabulary], None)


def _sudoku_look(size: int) -> Look:
    return Look((size, size), " ." + "123456789"[:size], 1)


def _maze_look(shape: tuple[int, int]) -> Look:
    return Look(shape, " " + mazes.CHARACTERS, mazes.OPEN)


_ARC_LOOK = Look((arc.SIZE, arc.SIZE), " |" + "0123456789", None)


def _arc_tasks(config: PuzzleDataConfig, folder: Path) -> PuzzleData:
    parts = [folder / name for name in ("training", "evaluation")]
    if any(part.is_dir() for part in parts):
        training, evaluation = (arc.read_tasks(part) if part.is_dir() else [] for part in parts)
    else:
        training, evaluation = [], arc.read_tasks(folder)
    copies = COPIES["arc"] if config.augmentations is None else config.augmentations
    sets = arc.puzzle_sets(training, evaluation, augmentations=copies, seed=config.seed)
    if sets.test is None:
        raise UserError(f"{folder} has no task with a test to evaluate on (evaluation/*.json).")
    return _complete(
        [sets.train],
        sets.test,
        config,
        arc.VOCABULARY,
        _ARC_LOOK,
        identifiers=len(sets.names),
        names=sets.names,
        tasks=[task for task in evaluation if _is_open(task)],
    )


def _is_open(task: arc.Task) -> bool:
    """Whether the answers to a task's tests are known."""
    return bool(task.test) and all(pair.answer is not None for pair in task.test)
