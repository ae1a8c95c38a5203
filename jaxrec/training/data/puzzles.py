"""Puzzles as rows of tokens, and the groups in which their variants are kept."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class PuzzleSet(NamedTuple):
    """Examples that belong to puzzles, which belong to groups.

    A group is a puzzle with its augmented copies; puzzle p of a set has the examples
    puzzle_indices[p] .. puzzle_indices[p + 1] - 1, and group g the puzzles group_indices[g] ..
    group_indices[g + 1] - 1.
    """

    inputs: np.ndarray  # (examples s), tokens
    labels: np.ndarray  # (examples s), tokens
    puzzle_identifiers: np.ndarray  # (puzzles): which vector is theirs
    puzzle_indices: np.ndarray  # (puzzles+1), from 0 to examples
    group_indices: np.ndarray  # (groups+1), from 0 to puzzles


def single_puzzles(inputs: np.ndarray, labels: np.ndarray, *, copies: int = 1) -> PuzzleSet:
    """A set whose puzzles have one example each and no vector of their own.

    Args:
      inputs: tokens (examples s).
      labels: tokens (examples s).
      copies: so many examples one after another make up a group.

    Raises:
      ValueError: the shapes differ, or the examples do not make up whole groups.
    """
    if inputs.ndim != 2 or inputs.shape != labels.shape or len(inputs) % copies:
        raise ValueError(
            f"single_puzzles: inputs and labels must both be (examples s), in groups of {copies},"
            f" got {inputs.shape} and {labels.shape}."
        )
    puzzles = len(inputs)
    return PuzzleSet(
        inputs,
        labels,
        np.zeros(puzzles, np.int32),
        np.arange(puzzles + 1, dtype=np.int32),
        np.arange(0, puzzles + 1, copies, dtype=np.int32),
    )


def joined(sets: Sequence[PuzzleSet]) -> PuzzleSet:
    """One set of several, one after another."""
    if len(sets) == 1:
        return sets[0]

    def fences(arrays: list[np.ndarray]) -> np.ndarray:
        ends = np.cumsum([0, *(int(array[-1]) for array in arrays)])
        parts = [array[1:].astype(np.int64) + end for array, end in zip(arrays, ends, strict=False)]
        return np.concatenate([[0], *parts])

    inputs, labels, identifiers, puzzles, groups = zip(*sets, strict=True)
    return PuzzleSet(
        np.concatenate(inputs),
        np.concatenate(labels),
        np.concatenate(identifiers),
        fences(puzzles),
        fences(groups),
    )


def spread(puzzles: PuzzleSet, count: int) -> PuzzleSet:
    """So many examples from all over a set, each as a puzzle and a group of its own."""
    examples = np.arange(count) * len(puzzles.inputs) // count
    which = np.searchsorted(puzzles.puzzle_indices, examples, side="right") - 1
    fence = np.arange(count + 1, dtype=np.int32)
    return PuzzleSet(
        puzzles.inputs[examples],
        puzzles.labels[examples],
        puzzles.puzzle_identifiers[which],
        fence,
        fence,
    )


DIHEDRAL_INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)
"""Which of the eight turns and reflections of `dihedral` undoes which."""


def dihedral(grid: np.ndarray, which: int) -> np.ndarray:
    """Turns a grid (x y ...) by 0, 90, 180, 270 degrees to the left, or mirrors it left to right,
    up to down, along the main or along the other diagonal; numbered as published.
    """
    if which < 4:
        return np.rot90(grid, which)
    if which < 6:
        return np.flip(grid, 1 if which == 4 else 0)
    mirrored = np.swapaxes(grid, 0, 1)
    return mirrored if which == 6 else np.rot90(mirrored, 2)
