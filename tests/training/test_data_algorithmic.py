"""Made sequences are what their rules say, at every length and with padding."""

import numpy as np
import pytest

from jaxrec.training.data.algorithmic import BEGIN, END, PLUS, SPECIAL, chains, transduction
from jaxrec.training.data.batches import IGNORED


def rows(data):
    """Sources and targets as lists of tokens without what frames them."""
    for source, real, inputs, labels in zip(*data, strict=True):
        target = labels[labels != IGNORED].tolist()
        assert target[-1] == END
        count = len(target)
        assert inputs[:count].tolist() == [BEGIN, *target[:-1]]
        assert not inputs[count:].any() and not source[~real].any()
        yield source[real].tolist(), target[:-1]


@pytest.mark.parametrize("rule", ["copy", "reverse"])
def test_digits_come_back(rule):
    data = transduction(rule, 200, (2, 5), base=7, room=6, seed=0)
    assert data.source.shape == (200, 6) and data.labels.shape == (200, 7)
    lengths = set()
    for source, target in rows(data):
        lengths.add(len(source))
        assert target == (source if rule == "copy" else source[::-1])
        assert min(source) >= SPECIAL and max(source) < SPECIAL + 7
    assert lengths == {2, 3, 4, 5}


def test_sums_are_sums():
    def number(tokens):
        return sum((token - SPECIAL) * 10**i for i, token in enumerate(tokens))

    data = transduction("addition", 200, (1, 4), room=5, seed=0)
    assert data.source.shape == (200, 11) and data.labels.shape == (200, 7)
    for source, target in rows(data):
        middle = source.index(PLUS)
        first, second = source[:middle], source[middle + 1 :]
        assert len(first) == len(second) == len(target) - 1
        assert number(first) + number(second) == number(target)


def test_chains_lead_where_their_facts_do():
    task = chains(200, entities=5, hops=(1, 3), seed=0)
    counts = set()
    for inputs, labels in zip(*task, strict=True):
        assert (labels[:-1] == IGNORED).all()
        facts = dict(divmod(int(fact), 5) for fact in inputs[:5])
        assert sorted(facts) == sorted(facts.values()) == list(range(5))
        hops, at = int(inputs[-2]) - 30, int(inputs[-1]) - 25
        counts.add(hops)
        for _ in range(hops):
            at = facts[at]
        assert labels[-1] == 25 + at
    assert counts == {1, 2, 3}


def test_a_batch_is_int32_with_a_mask_and_a_function_of_its_seed():
    one, same, other = (transduction("copy", 3, (1, 4), seed=seed).batch() for seed in (0, 0, 1))
    assert {x.dtype.name for x in one.values()} == {"int32", "bool"}
    for name, x in one.items():
        np.testing.assert_array_equal(x, same[name])
    assert np.any(one["source"] != other["source"])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: transduction("sort", 2, (1, 2), seed=0), "rule must be one of .*, got 'sort'"),
        (lambda: transduction("copy", 2, (3, 2), seed=0), r"got lengths \(3, 2\), room 2"),
        (lambda: transduction("copy", 2, (1, 4), room=3, seed=0), "largest length <= room"),
        (lambda: chains(2, entities=1, hops=(1, 2), seed=0), "needs entities >= 2"),
        (lambda: chains(2, entities=3, hops=(2, 1), seed=0), r"got 3 and \(2, 1\)"),
    ],
)
def test_what_cannot_be_made_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
