"""Batches: a function of (seed, step), each token once per epoch, no label across documents."""

import threading

import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.training.data import Batches, ByteTokenizer, Document, TokenStream, prefetch, tokenize

BOS = 256


def stream_of(*texts):
    documents = [Document(str(i), text, str(i)) for i, text in enumerate(texts)]
    return tokenize(documents, ByteTokenizer())


def numbered(n):
    """A stream of one document whose tokens say where they are."""
    return TokenStream(np.arange(n, dtype=np.uint16), np.zeros(1, np.int64), n, 2**16)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_windows_segments_and_labels_on_a_tiny_text():
    # tokens: BOS a b c | BOS d | BOS e f   (9 tokens: windows of 3 inputs begin at 0, 3 and 6)
    batches = Batches(stream_of(b"abc", b"d", b"ef"), batch=2, time=3, shuffle=False)
    a, b, c, d, e, f = b"abcdef"
    assert (batches.num_windows, batches.num_batches) == (3, 2)
    first, last = batches(0), batches(1)
    assert first["inputs"].tolist() == [[BOS, a, b], [c, BOS, d]]
    assert first["labels"].tolist() == [[a, b, c], [-100, d, -100]]
    assert first["segment_ids"].tolist() == [[1, 1, 1], [1, 2, 2]]
    # the last window has two inputs with a next token, the last row no window
    assert last["inputs"].tolist() == [[BOS, e, 0], [0, 0, 0]]
    assert last["labels"].tolist() == [[e, f, -100], [-100, -100, -100]]
    assert last["segment_ids"].tolist() == [[1, 1, 0], [0, 0, 0]]
    assert {array.dtype for array in first.values()} == {np.dtype(np.int32)}


def test_without_bos_the_first_token_of_a_document_is_no_label():
    tokens = np.array([5, 6, 7, 8, 9], np.uint32)
    stream = TokenStream(tokens, np.array([0, 2, 3]), 5, 2**17)
    batch = Batches(stream, batch=1, time=4, shuffle=False)(0)
    assert batch["labels"].tolist() == [[6, -100, -100, 9]]
    assert batch["segment_ids"].tolist() == [[1, 1, 2, 3]]


@pytest.mark.parametrize("tokens", [50, 53, 61])
def test_each_token_is_a_label_once_per_epoch(tokens):
    batches = Batches(numbered(tokens), batch=1, time=4, seed=3)
    epochs = []
    for epoch in range(3):
        steps = range(epoch * batches.num_windows, (epoch + 1) * batches.num_windows)
        rows = [batches(step) for step in steps]
        labels = np.concatenate([row["labels"] for row in rows]).ravel()
        inputs = np.concatenate([row["inputs"] for row in rows]).ravel()
        real = labels >= 0
        assert sorted(labels[real]) == list(range(1, tokens))
        assert (labels[real] == inputs[real] + 1).all()
        epochs.append(labels.tolist())
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]  # a new order each time


def test_the_bytes_of_documents_are_the_labels():
    stream = stream_of(*[bytes([i]) * (7 * i % 23 + 1) for i in range(1, 60)])
    evaluation = Batches(stream, batch=4, time=16, shuffle=False)
    labels = np.concatenate(
        [evaluation(step)["labels"].ravel() for step in range(evaluation.num_batches)]
    )
    assert (labels >= 0).sum() == stream.num_bytes  # what bits per byte divides by
    assert BOS not in labels


def test_a_batch_is_a_function_of_seed_and_step():
    stream = numbered(1000)
    one, same = (Batches(stream, batch=4, time=8, seed=7) for _ in range(2))
    later_first = [one(step) for step in (90, 0, 31)]
    for step, batch in zip(
        (0, 31, 90), (later_first[1], later_first[2], later_first[0]), strict=True
    ):
        assert_same(batch, same(step))
    other = Batches(stream, batch=4, time=8, seed=8)
    assert not np.array_equal(one(0)["inputs"], other(0)["inputs"])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_any_number_of_hosts_makes_the_same_global_batch(hosts, shuffle):
    batches = Batches(numbered(300), batch=8, time=8, seed=1, shuffle=shuffle)
    per_host = 8 // hosts
    for step in (0, 1, 4):
        parts = [batches(step, (i * per_host, (i + 1) * per_host)) for i in range(hosts)]
        assert_same(
            {name: np.concatenate([part[name] for part in parts]) for name in parts[0]},
            batches(step),
        )
    assert_same(batches(0, slice(2, 4)), batches(0, (2, 4)))


def test_a_quick_evaluation_is_spread_over_the_stream():
    batches = Batches(numbered(401), batch=3, time=4, shuffle=False, max_windows=5)
    assert (batches.num_windows, batches.num_batches) == (5, 2)
    first = np.concatenate([batches(step)["inputs"] for step in range(2)])[:, 0]
    assert first.tolist() == [0, 80, 160, 240, 320, 0]
    assert batches(1)["segment_ids"][:, 0].tolist() == [1, 1, 0]
    more = Batches(numbered(401), batch=100, time=4, shuffle=False, max_windows=1000)
    assert more.num_windows == 100


def test_an_evaluation_ends():
    batches = Batches(numbered(20), batch=2, time=4, shuffle=False)
    for step in (-1, batches.num_batches):
        with pytest.raises(IndexError, match=rf"step {step} is not in 0 \.\. 2"):
            batches(step)
    short = Batches(numbered(2), batch=1, time=4, shuffle=False)
    assert short(0)["labels"].tolist() == [[1, -100, -100, -100]]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"time": 20}, "training text has 20 tokens; one window needs 21 .*Give more text or a sh"),
        ({"batch": 0}, "batch must be at least 1; got 0"),
        ({"time": 0}, "time must be at least 1; got 0"),
        ({"max_windows": 0}, "max_windows must be at least 1; got 0"),
        ({"seed": -1}, r"seed must be in 0 \.\. 2\*\*32 - 1; got -1"),
    ],
)
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        Batches(numbered(20), **({"batch": 2, "time": 4} | changes))


def test_one_token_is_too_short_to_evaluate():
    with pytest.raises(UserError, match="evaluation text has 1 tokens; at least 2 are needed"):
        Batches(numbered(1), batch=2, time=4, shuffle=False)


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetching_changes_nothing():
    batches = Batches(numbered(300), batch=4, time=8, seed=1)
    steps = []
    for step, batch in prefetch(batches, 3, 9, rows=(0, 2)):
        assert_same(batch, batches(step, (0, 2)))
        steps.append(step)
    assert steps == list(range(3, 9))
    assert prefetch_threads() == []


def test_prefetching_stays_ahead_by_its_depth():
    made = []
    iterator = prefetch(lambda step, rows: made.append(step) or {}, depth=3)
    assert next(iterator)[0] == 0
    iterator.close()  # waits for what is under way
    assert made == sorted(made)
    assert set(made) <= {0, 1, 2, 3}


def test_leaving_an_endless_prefetch_ends_its_thread():
    batches = Batches(numbered(300), batch=4, time=8)
    iterator = prefetch(batches)
    assert [next(iterator)[0] for _ in range(3)] == [0, 1, 2]
    assert len(prefetch_threads()) == 1
    iterator.close()
    assert prefetch_threads() == []


def test_a_batch_that_never_comes_is_told():
    """The thread that hangs is left behind; the process can end."""
    hang = threading.Event()
    iterator = prefetch(lambda step, rows: hang.wait() if step == 1 else {}, limit=0.2)
    assert next(iterator)[0] == 0
    with pytest.raises(UserError, match=r"The batch of step 1 was not there after 0 s"):
        next(iterator)
    (thread,) = prefetch_threads()
    assert thread.daemon
    hang.set()
    thread.join()


def test_an_error_while_prefetching_is_raised_at_its_step():
    def make(step, rows):
        if step == 2:
            raise OSError("disk gone")
        return {}

    seen = []
    with pytest.raises(OSError, match="disk gone"):
        seen.extend(step for step, _ in prefetch(make, 0, 5))
    assert prefetch_threads() == []
    iterator = prefetch(make, 0, 5)
    assert [next(iterator)[0], next(iterator)[0]] == [0, 1]
    with pytest.raises(OSError, match="disk gone"):
        next(iterator)
