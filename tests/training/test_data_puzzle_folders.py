"""Folders of puzzles: what is read and written, and what is refused by file."""

import json

import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.training.data import mazes, sudoku
from jaxrec.training.data.puzzle_batches import GroupBatches
from jaxrec.training.data.puzzle_folders import (
    BLANK,
    Description,
    read_identifiers,
    read_split,
    write_identifiers,
    write_split,
)

# Two groups: one of two puzzles with 1 and 2 examples, one of a single puzzle with one.
ARRAYS = {
    "inputs": np.arange(12, dtype=np.uint8).reshape(4, 3),
    "labels": np.arange(12, dtype=np.uint8).reshape(4, 3)[::-1],
    "puzzle_identifiers": np.array([3, 1, 2], np.int32),
    "puzzle_indices": np.array([0, 1, 3, 4], np.int32),
    "group_indices": np.array([0, 2, 3], np.int32),
}
DATASET = {
    "pad_id": 0,
    "ignore_label_id": 0,
    "blank_identifier_id": 0,
    "vocab_size": 12,
    "seq_len": 3,
    "num_puzzle_identifiers": 4,
    "total_groups": 2,
    "mean_puzzle_examples": 1.5,
    "sets": ["all"],
}


@pytest.fixture
def folder(tmp_path):
    """A split, written by hand."""
    for name, array in ARRAYS.items():
        np.save(tmp_path / f"all__{name}.npy", array)
    (tmp_path / "dataset.json").write_text(json.dumps(DATASET | {"note": "not ours"}))
    return tmp_path


def test_a_split_is_read_as_it_is(folder):
    split = read_split(folder)
    assert split.description == Description(**DATASET | {"sets": ("all",)})
    assert isinstance(split.sets["all"].inputs, np.memmap)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(getattr(split.sets["all"], name), array)
    rows = GroupBatches(list(split.sets.values()), batch=1)(0)
    assert rows.tokens.tolist() in ARRAYS["inputs"][:, None].tolist()
    assert split.description.steps(epochs=100, batch=7) == 42


def test_nothing_need_be_ignored(folder):
    (folder / "dataset.json").write_text(json.dumps(DATASET | {"ignore_label_id": None}))
    assert read_split(folder).description.ignore_label_id is None


def test_the_ignored_label_need_be_no_token(folder):
    np.save(folder / "all__labels.npy", changed(ARRAYS["labels"].astype(int), (1, 1), -7))
    with pytest.raises(UserError, match=r"labels.npy, row 1: .* got -7"):
        read_split(folder)
    (folder / "dataset.json").write_text(json.dumps(DATASET | {"ignore_label_id": -7}))
    assert read_split(folder).sets["all"].labels[1, 1] == -7


def test_what_is_written_is_read_again(folder, tmp_path):
    sets = read_split(folder).sets
    write_split(tmp_path / "made" / "train", sets, vocabulary=12, identifiers=4)
    again = read_split(tmp_path / "made" / "train")
    assert dict(vars(again.description)) == DATASET | {
        "sets": ("all",),
        "mean_puzzle_examples": 4 / 3,
    }
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(getattr(again.sets["all"], name), array)
    with pytest.raises(UserError, match="train exists already; choose another folder"):
        write_split(tmp_path / "made" / "train", sets, vocabulary=12)
    write_identifiers(tmp_path / "made", [BLANK, "one"])
    assert read_identifiers(tmp_path / "made") == ["<blank>", "one"]


@pytest.mark.parametrize(
    "sets, vocabulary, message",
    [
        ({}, 6, "a split needs at least one set"),
        ("a maze", 2, r"maze__inputs.npy, row 0: numbers must be 0 \.\. 1 by dataset.json, got"),
    ],
)
def test_nothing_is_left_half_written(tmp_path, sets, vocabulary, message):
    if sets:
        sets = {"maze": mazes.puzzle_set([mazes.make(3, 3, seed=0)])}
    with pytest.raises(UserError, match=message):
        write_split(tmp_path / "train", sets, vocabulary=vocabulary)
    assert list(tmp_path.iterdir()) == []


def test_made_puzzles_can_be_kept(tmp_path):
    puzzles = sudoku.puzzle_set([sudoku.make(4, seed=0)], augmentations=3)
    write_split(tmp_path / "train", {"all": puzzles}, vocabulary=sudoku.vocabulary(4))
    description, sets = read_split(tmp_path / "train")
    assert (description.seq_len, description.vocab_size, description.total_groups) == (16, 6, 1)
    np.testing.assert_array_equal(sets["all"].inputs, puzzles.inputs)


def changed(array, at, value):
    array = array.copy()
    array[at] = value
    return array


@pytest.mark.parametrize(
    "name, array, message",
    [
        ("labels", None, "Cannot read .*all__labels.npy"),
        ("inputs", np.array([{}] * 4), "Cannot read .*inputs.npy: .*Python objects"),
        ("inputs", np.zeros((4, 3), np.float32), "inputs.npy must hold integers, got float32"),
        ("inputs", np.zeros(4, int), r"inputs.npy must have 2 axes, got an array of shape \(4,\)"),
        ("group_indices", np.zeros((2, 2), int), "group_indices.npy must have 1 axes"),
        ("labels", np.zeros((4, 2), int), "labels.npy has rows of length 2, expected 3, the seq"),
        ("labels", np.zeros((3, 3), int), "labels.npy has 3 rows, expected 4"),
        (
            "labels",
            changed(ARRAYS["labels"], (2, 1), 12),
            r"labels.npy, row 2: numbers must be 0 \.\. 11 by dataset.json, got 12",
        ),
        (
            "inputs",
            changed(ARRAYS["inputs"].astype(np.int8), (3, 0), -1),
            r"inputs.npy, row 3: .* got -1",
        ),
        ("puzzle_identifiers", np.array([0, 4, 1]), r"row 1: numbers must be 0 \.\. 3 .*got 4"),
        (
            "puzzle_indices",
            np.array([0, 1, 2, 3]),
            r"0 to 4, the number of examples, got \[0, 3\]",
        ),
        ("puzzle_indices", np.array([0, 3, 1, 4]), "to 4, the .* not above the one before"),
        ("puzzle_indices", np.array([0, 1, 4]), "has 3 numbers, expected 4, one more than there"),
        ("group_indices", np.array([0, 2, 2, 3]), "must rise from 0 to 3, the number of puzzles"),
        ("group_indices", np.array([], int), "number of puzzles, got too few numbers"),
    ],
)
def test_odd_arrays_are_named(folder, name, array, message):
    file = folder / f"all__{name}.npy"
    file.unlink()
    if array is not None:
        np.save(file, array)
    with pytest.raises(UserError, match=message):
        read_split(folder)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "Cannot read .*dataset.json"),
        ("{", "Cannot read .*dataset.json: .*column"),
        ("[]", "must be an object with all of pad_id, .* missing: pad_id"),
        ('{"pad_id": 0}', "missing: ignore_label_id, blank_identifier_id"),
        ({"seq_len": "3"}, "seq_len must be an integer, got '3'"),
        ({"vocab_size": True}, "vocab_size must be an integer, got True"),
        ({"mean_puzzle_examples": None}, "mean_puzzle_examples must be a number, got None"),
        ({"sets": []}, r"sets must be a list of names, at least one, got \[\]"),
        ({"sets": ["all", "more"]}, "Cannot read .*more__inputs.npy"),
        ({"vocab_size": 11}, "inputs.npy, row 3: .* got 11"),
    ],
)
def test_odd_descriptions_are_named(folder, text, message):
    (folder / "dataset.json").unlink()
    if text is not None:
        text = text if isinstance(text, str) else json.dumps(DATASET | text)
        (folder / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_split(folder)


def test_an_archive_of_arrays_is_no_array(folder):
    with (folder / "all__inputs.npy").open("wb") as file:
        np.savez(file, inputs=ARRAYS["inputs"])
    with pytest.raises(UserError, match=r"inputs.npy must be one array, got an archive"):
        read_split(folder)


def test_odd_folders_are_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"none is no folder; expected one with a dataset.json"):
        read_split(folder / "none")
    write_split(tmp_path / "data" / "train", read_split(folder).sets, vocabulary=12, identifiers=4)
    with pytest.raises(UserError, match=r"data holds splits, no dataset.json; give .*data/train"):
        read_split(tmp_path / "data")
    with pytest.raises(UserError, match=r"Cannot read .*identifiers.json"):
        read_identifiers(folder)
    (folder / "identifiers.json").write_text("{}")
    with pytest.raises(UserError, match=r"identifiers.json must hold a list of names"):
        read_identifiers(folder)
