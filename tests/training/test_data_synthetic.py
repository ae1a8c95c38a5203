"""Made tasks: that their answers can be found in them, and nowhere else."""

import itertools

import numpy as np
import pytest

from jaxrec.training.data import synthetic
from jaxrec.training.data.batches import IGNORED


def test_the_lists_share_the_token_that_is_asked_for_and_no_other():
    task = synthetic.set_disjointness(20, 3, 9, vocab=40, seed=1)
    assert task.inputs.shape == task.labels.shape == (20, 15)
    for row, label in zip(task.inputs, task.labels, strict=True):
        assert (row[0], row[4], row[14]) == (1, 2, 3)
        a, b = row[1:4], row[5:14]
        assert set(a) & set(b) == {label[-1]}
        assert len(set(a)) == 3 and len(set(b)) == 9
        assert min(*a, *b) >= 4 and max(*a, *b) < 40
        assert np.all(label[:-1] == IGNORED)
    again = synthetic.set_disjointness(20, 3, 9, vocab=40, seed=1)
    np.testing.assert_array_equal(task.inputs, again.inputs)
    assert np.any(task.inputs != synthetic.set_disjointness(20, 3, 9, vocab=40, seed=2).inputs)


def test_every_key_is_asked_for_once_and_answered_by_its_value():
    task = synthetic.associative_recall(20, 4, 32, vocab=24, seed=0)
    for row, label in zip(task.inputs, task.labels, strict=True):
        pairs = dict(zip(row[:8:2].tolist(), row[1:8:2].tolist(), strict=True))
        assert len(pairs) == 4 and max(pairs) < 12 <= min(pairs.values())
        (asked,) = np.nonzero(label != IGNORED)
        assert asked.min() >= 8
        assert {row[i]: label[i] for i in asked} == pairs
        np.testing.assert_array_equal(row[asked + 1], label[asked])
        rest = np.delete(row, [*range(8), *asked, *(asked + 1)])
        assert not np.any(rest)


def test_parity_counts_ones():
    task = synthetic.parity(10, 9, seed=3)
    assert set(np.unique(task.inputs)) == {0, 1}
    for row, label in zip(task.inputs, task.labels, strict=True):
        assert label.tolist() == [sum(row[: t + 1]) % 2 for t in range(9)]
    assert 0.3 < np.mean(task.labels) < 0.7
    assert np.any(task.inputs != synthetic.parity(10, 9, seed=4).inputs)


@pytest.mark.parametrize("modulus", [5, 7])
def test_arithmetic_is_worked_out_from_left_to_right(modulus):
    task = synthetic.modular_arithmetic(20, 10, modulus=modulus, seed=0)
    signs = {modulus: "+", modulus + 1: "-", modulus + 2: "*"}
    for row, label in zip(task.inputs.tolist(), task.labels.tolist(), strict=True):
        text = str(row[0])
        assert label[0] == row[0]
        for t in range(2, 10, 2):
            text = f"({text}{signs[row[t - 1]]}{row[t]})"
            assert label[t] == eval(text) % modulus
        assert label[1::2] == [IGNORED] * 5
    assert set(np.unique(task.inputs[:, ::2])) == set(range(modulus))
    assert set(np.unique(task.inputs[:, 1::2])) == set(signs)


def test_swaps_are_composed():
    task = synthetic.permutations(30, 8, seed=0)
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    orders = sorted(itertools.permutations("abcde"))
    for row, label in zip(task.inputs, task.labels, strict=True):
        order = list("abcde")
        for token, answer in zip(row, label, strict=True):
            i, j = pairs[token]
            order[i], order[j] = order[j], order[i]
            assert orders[answer] == tuple(order)
    assert len(np.unique(task.inputs)) == 10
    assert len(np.unique(synthetic.permutations(40, 50, seed=0).labels)) == 120


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: synthetic.set_disjointness(1, 3, 20, vocab=40, seed=0),
            r"lists of 3 and 20 tokens need 1 \.\. 20 and 1 \.\. 16 for a vocabulary of 40",
        ),
        (
            lambda: synthetic.associative_recall(1, 4, 15, vocab=24, seed=0),
            "4 pairs need t >= 16 and vocab >= 10, got 15 and 24",
        ),
        (lambda: synthetic.parity(1, 0, seed=0), "parity: t must be >= 1, got 0"),
        (
            lambda: synthetic.modular_arithmetic(1, 4, modulus=1, seed=0),
            "modulus must be >= 2, got 1",
        ),
        (
            lambda: synthetic.permutations(1, 4, elements=7, seed=0),
            r"elements must lie in 2 \.\. 6, got 7",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
