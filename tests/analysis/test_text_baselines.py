"""Baselines of text: probabilities that sum to one, equal to a naive count, honest on new text."""

import gzip
import itertools
from collections import Counter

import numpy as np
import pytest

from jaxrec.analysis.text_baselines import NGram, gzip_bits_per_byte, ngram_bits_per_byte
from jaxrec.errors import UserError

TRAIN = b"abracadabra, abacus; a cab, a crab. " * 3 + bytes(range(0, 256, 7))


def naive_probability(train, context, byte, order):
    """Witten-Bell as its formula reads, by counting."""
    p = 1 / 256
    for k in range(order + 1):
        if k > len(context):
            break
        c = context[len(context) - k :]
        followers = Counter(train[i + k] for i in range(len(train) - k) if train[i : i + k] == c)
        n, kinds = followers.total(), len(followers)
        if n:
            p = (followers[byte] + kinds * p) / (n + kinds)
    return p


@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
def test_probabilities_equal_the_formula(order):
    text = b"a crab, abracadabra\xfe zebra"
    expected = [
        naive_probability(TRAIN, text[max(0, i - order) : i], text[i], order)
        for i in range(len(text))
    ]
    # both sides are float64 sums of positive terms: a few roundings of 1e-16
    np.testing.assert_allclose(NGram.fit(TRAIN, order).probabilities(text), expected, rtol=1e-14)


def test_probabilities_of_the_next_byte_sum_to_one():
    model = NGram.fit(TRAIN, 3)
    for context in itertools.chain(
        map(bytes, itertools.product(b"ab", repeat=3)), [b"", b"a", b"zz", b"\xff\0\xff"]
    ):
        p = [model.probabilities(context + bytes([byte]))[-1] for byte in range(256)]
        assert min(p) > 0
        np.testing.assert_allclose(sum(p), 1, rtol=1e-13)  # 256 roundings of 1e-16


def test_random_bytes_cost_eight_bits_and_repetition_almost_none():
    rng = np.random.default_rng(0)
    train, valid = rng.bytes(200_000), rng.bytes(20_000)
    assert 8.0 < ngram_bits_per_byte(train, valid, order=0) < 8.01
    assert ngram_bits_per_byte(train, valid, order=3) > 8.0  # nothing to learn
    assert ngram_bits_per_byte(b"abcd" * 5000, b"abcd" * 100) < 0.1


def test_the_judged_text_is_not_learnt():
    new = b"\xf0\xf1\xf2\xf3" * 100
    # bytes never seen, in contexts never seen: the share of order 0 left to them, spread evenly
    counts = Counter(b"abcd" * 1000)
    floor = -np.log2(len(counts) / (4000 + len(counts)) / 256)
    assert ngram_bits_per_byte(b"abcd" * 1000, new) >= floor - 1e-12


def test_training_may_be_capped():
    assert ngram_bits_per_byte(TRAIN + b"zzzz" * 99, b"abra zz", max_train_bytes=len(TRAIN)) == (
        ngram_bits_per_byte(TRAIN, b"abra zz")
    )


def test_gzip_counts_every_byte_it_writes():
    text = b"spam and eggs " * 50
    assert gzip_bits_per_byte(text) == 8 * len(gzip.compress(text, 9)) / len(text)


def test_texts_shorter_than_the_context():
    assert ngram_bits_per_byte(b"a", b"b", order=3) > 8
    assert len(NGram.fit(b"ab", 3).probabilities(b"a")) == 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: gzip_bits_per_byte(b""), "text is empty"),
        (lambda: ngram_bits_per_byte(b"a", b""), "validation text is empty"),
        (lambda: ngram_bits_per_byte(b"", b"a"), "needs a training text; this one is empty"),
        (lambda: ngram_bits_per_byte(b"a", b"a", order=8), r"must be in 0 \.\. 7; got 8"),
    ],
)
def test_empty_texts_and_odd_orders_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
