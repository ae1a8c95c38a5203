"""Batches of puzzles: a function of (seed, step), each group once per epoch, as published."""

import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.training.data.batches import IGNORED
from jaxrec.training.data.puzzle_batches import GroupBatches, OrderedBatches
from jaxrec.training.data.puzzles import PuzzleSet, single_puzzles


def ragged(seed=0, groups=7):
    """Groups of 1 .. 3 puzzles of 1 .. 4 examples; tokens say which example, group and puzzle."""
    rng = np.random.default_rng(seed)
    group_indices = np.concatenate([[0], np.cumsum(rng.integers(1, 4, groups))])
    puzzles = group_indices[-1]
    puzzle_indices = np.concatenate([[0], np.cumsum(rng.integers(1, 5, puzzles))])
    example = np.arange(puzzle_indices[-1])
    puzzle = np.searchsorted(puzzle_indices, example, side="right") - 1
    group = np.searchsorted(group_indices, puzzle, side="right") - 1
    inputs = np.stack([example, group, puzzle], axis=1)
    # Of kinds of integers that do not mix well.
    bounds = puzzle_indices.astype(np.uint64), group_indices.astype(np.uint32)
    return PuzzleSet(inputs, inputs, 100 + np.arange(puzzles), *bounds)


def published(puzzles, *, batch, seed, epochs, iterations):
    """(puzzle, count) pairs of each batch, by a loop over draws one at a time."""
    puzzles = PuzzleSet(*(array.astype(np.int64) for array in puzzles))
    batches = []
    for iteration in range(1, iterations + 1):
        rng = np.random.Generator(np.random.Philox(seed=seed + iteration))
        groups = len(puzzles.group_indices) - 1
        order = [group for _ in range(epochs) for group in rng.permutation(groups)]
        taken, room = [], batch
        for group in order:
            puzzle = rng.integers(puzzles.group_indices[group], puzzles.group_indices[group + 1])
            count = puzzles.puzzle_indices[puzzle + 1] - puzzles.puzzle_indices[puzzle]
            taken.append((int(puzzle), int(min(count, room))))
            room -= taken[-1][1]
            if room == 0:
                batches.append(taken)
                taken, room = [], batch
    return batches


def assert_same(one, other):
    for x, y in zip(one, other, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("batch, epochs", [(3, 1), (5, 2), (16, 9)])
def test_groups_and_puzzles_follow_the_published_order(batch, epochs):
    puzzles = ragged()
    batches = GroupBatches([puzzles], batch=batch, seed=11, epochs=epochs, ignored_label=None)
    wanted = published(puzzles, batch=batch, seed=11, epochs=epochs, iterations=4)
    assert len(wanted) >= 8
    for step, taken in enumerate(wanted):
        rows = batches(step)
        assert rows.tokens.shape == (batch, 3) and {x.dtype for x in rows} == {np.dtype(np.int32)}
        np.testing.assert_array_equal(
            rows.tokens[:, 2], [puzzle for puzzle, count in taken for _ in range(count)]
        )
        np.testing.assert_array_equal(rows.puzzle, 100 + rows.tokens[:, 2])
        np.testing.assert_array_equal(rows.labels, rows.tokens)
        at = 0
        for puzzle, count in taken:
            drawn = set(rows.tokens[at : at + count, 0].tolist())
            assert len(drawn) == count
            assert drawn <= set(range(*puzzles.puzzle_indices[puzzle : puzzle + 2]))
            at += count


def test_every_epoch_visits_each_group_once():
    puzzles = single_puzzles(*[np.arange(24)[:, None]] * 2, copies=4)
    batches = GroupBatches([puzzles], batch=2, ignored_label=None)
    chosen = np.array([[batches(3 * epoch + i).tokens for i in range(3)] for epoch in range(30)])
    groups = chosen.reshape(30, 6) // 4
    assert np.all(np.sort(groups, axis=1) == np.arange(6))
    assert len(np.unique(groups, axis=0)) > 20
    assert len(np.unique(chosen)) == 24  # every copy has its turn


def test_all_examples_of_a_cut_puzzle_have_their_turn():
    puzzles = PuzzleSet(
        np.arange(5)[:, None], np.zeros((5, 1)), *map(np.array, ([0], [0, 5], [0, 1]))
    )
    batches = GroupBatches([puzzles], batch=2)
    drawn = {tuple(sorted(batches(step).tokens[:, 0].tolist())) for step in range(60)}
    assert len(drawn) == 10


def test_a_batch_is_a_function_of_seed_and_step():
    sets = [ragged(), ragged(1, groups=4)]
    one, same = (GroupBatches(sets, batch=4, seed=3) for _ in range(2))
    late_first = {step: one(step) for step in (40, 0, 7)}
    for step in range(41):
        rows = same(step)
        if step in late_first:
            assert_same(rows, late_first[step])
    other = GroupBatches(sets, batch=4, seed=4)
    assert any(np.any(other(step).tokens != one(step).tokens) for step in range(3))
    half = [one(7, (0, 2)), one(7, slice(2, 4))]
    assert_same([np.concatenate(x) for x in zip(*half, strict=True)], one(7))


def test_sets_take_turns():
    first = single_puzzles(*[np.arange(4)[:, None]] * 2)
    second = single_puzzles(*[10 + np.arange(6)[:, None]] * 2)
    batches = GroupBatches([first, second], batch=2, ignored_label=None)
    turns = [int(batches(step).tokens.min() >= 10) for step in range(10)]
    assert turns == [0, 0, 1, 1, 1, 0, 0, 1, 1, 1]


def test_labels_that_do_not_count():
    puzzles = single_puzzles(np.array([[3, 4]] * 2), np.array([[0, 7]] * 2))
    assert GroupBatches([puzzles], batch=2)(0).labels.tolist() == [[IGNORED, 7]] * 2
    kept = GroupBatches([puzzles], batch=2, ignored_label=None)(0)
    assert kept.labels.tolist() == [[0, 7]] * 2
    assert puzzles.labels.tolist() == [[0, 7]] * 2


def test_an_ordered_pass_is_padded():
    puzzles = ragged(groups=3)
    examples = len(puzzles.inputs)
    batches = OrderedBatches(puzzles, batch=5, pad=9, blank=1, ignored_label=None)
    assert batches.num_batches == -(-examples // 5) and examples % 5
    rows = [batches(step) for step in range(batches.num_batches)]
    tokens, labels, puzzle = (np.concatenate(x) for x in zip(*rows, strict=True))
    np.testing.assert_array_equal(tokens[:examples], puzzles.inputs)
    np.testing.assert_array_equal(labels[:examples], puzzles.inputs)
    np.testing.assert_array_equal(puzzle[:examples], 100 + puzzles.inputs[:, 2])
    assert np.all(tokens[examples:] == 9) and np.all(puzzle[examples:] == 1)
    assert np.all(labels[examples:] == IGNORED)
    assert_same(batches(1, (1, 3)), [x[1:3] for x in batches(1)])
    with pytest.raises(IndexError, match=f"step {batches.num_batches} is not in 0"):
        batches(batches.num_batches)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch": 0}, "batch must be at least 1; got 0"),
        ({"seed": -1}, "seed must be at least 0; got -1"),
        ({"epochs": 0}, "epochs must be at least 1; got 0"),
        ({"sets": []}, "need at least one set"),
        ({"batch": 5}, "batch of 5 is more than the 4 examples that 1 epochs of 4 groups"),
    ],
)
def test_what_gives_no_batches_is_named(arguments, message):
    puzzles = single_puzzles(*[np.arange(8)[:, None]] * 2, copies=2)
    with pytest.raises(UserError, match=message):
        GroupBatches(**({"sets": [puzzles], "batch": 2} | arguments))
    with pytest.raises(UserError, match="batch must be at least 1; got 0"):
        OrderedBatches(puzzles, batch=0)
    with pytest.raises(IndexError, match="step -1 is negative"):
        GroupBatches([puzzles], batch=2)(-1)
