"""Folders of puzzles in the published format: a folder for each split.

`dataset.json` describes the split and names its sets; each set is five arrays,
`<set>__{inputs,labels,puzzle_identifiers,puzzle_indices,group_indices}.npy`, see `PuzzleSet`.
Beside the splits, `identifiers.json` lists the names of the puzzles that have vectors.

Wang et al., Hierarchical reasoning model (2025), arXiv:2506.21734; their code's `dataset` folder.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrec.config import beside, read_json
from jaxrec.errors import UserError
from jaxrec.training.data.arrays import read_array
from jaxrec.training.data.puzzles import PuzzleSet

DESCRIPTION = "dataset.json"
IDENTIFIERS = "identifiers.json"
BLANK = "<blank>"
"""The name of the vector that belongs to no puzzle."""
ROWS = ("inputs", "labels")
AT_ONCE = 1 << 16  # rows of a memory-mapped array that are checked together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """What `dataset.json` says; its names."""

    pad_id: int  # token of the rows that fill up a batch
    ignore_label_id: int | None  # label that does not count
    blank_identifier_id: int  # vector of the rows that fill up a batch
    vocab_size: int
    seq_len: int
    num_puzzle_identifiers: int  # vectors
    total_groups: int
    mean_puzzle_examples: float
    sets: tuple[str, ...]

    def steps(self, epochs: int, batch: int) -> int:
        """Steps in which so many epochs pass, as published: an estimate."""
        return int(epochs * self.total_groups * self.mean_puzzle_examples / batch)


class Split(NamedTuple):
    """A folder's contents; inputs and labels are memory-mapped."""

    description: Description
    sets: dict[str, PuzzleSet]


def read_split(folder: str | Path) -> Split:
    """Reads and checks a split, such as dataset/train.

    Raises:
      UserError: something is missing, is no array of integers, does not fit the rest, or holds
        tokens or labels out of range; the message names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected one with a {DESCRIPTION}.")
    file = folder / DESCRIPTION
    if not file.exists() and (folder / "train" / DESCRIPTION).exists():
        raise UserError(f"{folder} holds splits, no {DESCRIPTION}; give {folder / 'train'}.")
    description = _description(file, read_json(file))
    sets = {}
    for name in description.sets:
        files = {field: beside(folder, file.name) for field, file in _files(folder, name).items()}
        arrays = PuzzleSet(**{field: _array(file, field) for field, file in files.items()})
        _check(files, arrays, description)
        sets[name] = arrays
    return Split(description, sets)


def write_split(
    folder: str | Path,
    sets: Mapping[str, PuzzleSet],
    *,
    vocabulary: int,
    identifiers: int = 1,
    ignored_label: int | None = 0,
) -> None:
    """Writes a split that `read_split` and the published code read, all of it or nothing.

    Args:
      folder: must not exist; the one above it is made.
      sets: at least one, all with rows of one length.
      vocabulary: number of tokens, of which 0 is padding.
      identifiers: number of vectors, of which 0 is that of no puzzle.
      ignored_label: label that does not count.

    Raises:
      UserError: the folder exists, or `read_split` would refuse the sets.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already; choose another folder or remove it.")
    if not sets:
        raise UserError(f"{folder}: a split needs at least one set.")
    groups, puzzles, examples = (
        sum(len(getattr(each, field)) - fence for each in sets.values())
        for field, fence in (("group_indices", 1), ("puzzle_identifiers", 0), ("inputs", 0))
    )
    description = Description(
        pad_id=0,
        ignore_label_id=ignored_label,
        blank_identifier_id=0,
        vocab_size=vocabulary,
        seq_len=next(iter(sets.values())).inputs.shape[-1],
        num_puzzle_identifiers=identifiers,
        total_groups=groups,
        mean_puzzle_examples=examples / max(puzzles, 1),
        sets=tuple(sets),
    )
    for name, arrays in sets.items():
        _check(_files(folder, name), arrays, description)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for name, arrays in sets.items():
            for field, file in _files(part, name).items():
                np.save(file, getattr(arrays, field), allow_pickle=False)
        text = json.dumps(dataclasses.asdict(description), indent=2)
        (part / DESCRIPTION).write_text(text + "\n")
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_identifiers(folder: str | Path) -> list[str]:
    """Names of the puzzles by their vectors, from the folder above the splits.

    Raises:
      UserError: the file is missing or no list of texts.
    """
    file = Path(folder) / IDENTIFIERS
    names = read_json(file)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file} must hold a list of names.")
    return names


def write_identifiers(folder: str | Path, names: Sequence[str]) -> None:
    """Writes the names of puzzles by their vectors; the first one is BLANK."""
    (Path(folder) / IDENTIFIERS).write_text(json.dumps(list(names)) + "\n")


def _files(folder: Path, name: str) -> dict[str, Path]:
    return {field: folder / f"{name}__{field}.npy" for field in PuzzleSet._fields}


def _description(file: Path, values: Any) -> Description:
    fields = [field.name for field in dataclasses.fields(Description)]
    missing = [name for name in fields if not isinstance(values, dict) or name not in values]
    if missing:
        raise UserError(
            f"{file} must be an object with all of {', '.join(fields)}; missing: "
            f"{', '.join(missing)}."
        )
    known = {name: values[name] for name in fields}  # others are allowed, as by the published code
    for name in fields[:-2]:
        if type(known[name]) is not int and (name, known[name]) != ("ignore_label_id", None):
            raise UserError(f"{file}: {name} must be an integer, got {known[name]!r}.")
    if type(known["mean_puzzle_examples"]) not in (int, float):
        raise UserError(
            f"{file}: mean_puzzle_examples must be a number, got {known['mean_puzzle_examples']!r}."
        )
    sets = known["sets"]
    if not (isinstance(sets, list) and sets and all(isinstance(name, str) for name in sets)):
        raise UserError(f"{file}: sets must be a list of names, at least one, got {sets!r}.")
    for name in sets:
        beside(file.parent, name)
    return Description(**known | {"sets": tuple(sets)})


def _array(file: Path, field: str) -> np.ndarray:
    """The array of a file; of the large ones a memory map."""
    array = read_array(file)
    return array if field in ROWS else np.array(array)


def _check(files: Mapping[str, Path], arrays: PuzzleSet, description: Description) -> None:
    for field, array in arrays._asdict().items():
        axes = 2 if field in ROWS else 1
        if not np.issubdtype(array.dtype, np.integer):
            raise UserError(f"{files[field]} must hold integers, got {array.dtype}.")
        if array.ndim != axes:
            raise UserError(
                f"{files[field]} must have {axes} axes, got an array of shape {array.shape}."
            )
    length, examples = description.seq_len, len(arrays.inputs)
    for field, besides in (("inputs", None), ("labels", description.ignore_label_id)):
        array = getattr(arrays, field)
        if array.shape[1] != length:
            raise UserError(
                f"{files[field]} has rows of length {array.shape[1]}, expected {length}, the"
                f" seq_len of {DESCRIPTION}."
            )
        if len(array) != examples:
            raise UserError(f"{files[field]} has {len(array)} rows, expected {examples}.")
        _check_range(files[field], array, description.vocab_size, besides)
    puzzles = len(arrays.puzzle_identifiers)
    _check_range(
        files["puzzle_identifiers"], arrays.puzzle_identifiers, description.num_puzzle_identifiers
    )
    for field, total, of in (
        ("puzzle_indices", examples, "examples"),
        ("group_indices", puzzles, "puzzles"),
    ):
        bounds = getattr(arrays, field).astype(np.int64)
        ends = bounds[[0, -1]].tolist() if len(bounds) > 1 else None
        if ends != [0, total] or np.any(np.diff(bounds) < 1):
            got = "a number that is not above the one before" if ends == [0, total] else ends
            raise UserError(
                f"{files[field]} must rise from 0 to {total}, the number of {of}, got"
                f" {got or 'too few numbers'}."
            )
    if len(arrays.puzzle_indices) != puzzles + 1:
        raise UserError(
            f"{files['puzzle_indices']} has {len(arrays.puzzle_indices)} numbers, expected"
            f" {puzzles + 1}, one more than there are puzzles in"
            f" {files['puzzle_identifiers'].name}."
        )


def _check_range(file: Path, array: np.ndarray, count: int, besides: int | None = None) -> None:
    for begin in range(0, len(array), AT_ONCE):
        part = array[begin : begin + AT_ONCE]
        odd = (part < 0) | (part >= count)
        if besides is not None:
            odd &= part != besides
        if odd.any():
            at = tuple(np.argwhere(odd)[0])
            raise UserError(
                f"{file}, row {begin + int(at[0])}: numbers must be 0 .. {count - 1} by"
                f" {DESCRIPTION}, got {part[at]}."
            )
