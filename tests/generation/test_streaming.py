import dataclasses
import functools

import jax
import pytest
from flax import nnx

from jaxrec.errors import UserError
from jaxrec.generation import SamplingConfig, complete, stream_text
from jaxrec.models.huginn import HuginnConfig

CONFIG = HuginnConfig(
    vocab_size=8,
    width=8,
    heads=2,
    mlp_width=8,
    prelude_layers=1,
    core_layers=1,
    coda_layers=1,
    context=64,
    mean_depth=1,
    backprop_depth=1,
)
LETTERS = "abcdefgh"
PROMPTS = [[1], [2, 3]]
NEW = 20
SETTINGS = {"max_new_tokens": NEW, "config": SamplingConfig(), "key": jax.random.key(0)}


@dataclasses.dataclass
class PairDecoder:
    """Shows letters two at a time, as if each pair were one character."""

    waiting: str = ""

    def push(self, index):
        text = self.waiting + LETTERS[index]
        self.waiting = text if len(text) < 2 else ""
        return text if len(text) == 2 else ""

    def flush(self):
        text, self.waiting = self.waiting, ""
        return text


@functools.cache
def texts():
    """What is drawn without any stop."""
    model = jax.jit(lambda: CONFIG.build(rngs=nnx.Rngs(0)))()
    rows = complete(model, PROMPTS, **SETTINGS)
    return model, ["".join(LETTERS[token] for token in row) for row in rows]


def collect(**arguments):
    model, _ = texts()
    stream = stream_text(model, PROMPTS, decoder=PairDecoder, **(SETTINGS | arguments))
    assert stream.report is None
    shown = ["", ""]
    for row, piece in stream:
        assert piece
        shown[row] += piece
    return shown, stream.report


def test_all_text_comes_and_is_reported():
    shown, report = collect()
    assert shown == texts()[1]
    assert report.tokens == (NEW, NEW)
    assert report.finish == ("length", "length")
    assert report.first_token_seconds > 0
    assert report.tokens_per_second > 0


def test_an_unfinished_pair_is_shown_at_the_end():
    shown, report = collect(max_new_tokens=7)
    assert shown == [text[:7] for text in texts()[1]]
    assert report.tokens == (7, 7)


def test_a_row_ends_before_its_stop_string_and_the_other_goes_on():
    _, (first, second) = texts()
    stop = next(first[i : i + 3] for i in range(NEW - 3) if first[i : i + 3] not in second)
    shown, report = collect(stop_strings=[stop])
    assert shown == [first[: first.index(stop)], second]
    assert report.finish == ("stop string", "length")
    assert first.index(stop) + 3 <= report.tokens[0] <= first.index(stop) + 4
    assert report.tokens[1] == NEW


def test_a_stop_string_may_end_in_what_was_held_back():
    _, (first, _) = texts()
    shown, report = collect(max_new_tokens=7, stop_strings=[first[4:7]])
    assert shown[0] == first[:7].partition(first[4:7])[0]
    assert report.finish[0] == "stop string"


def test_rows_end_at_stop_tokens():
    _, (first, second) = texts()
    stop = first[5]
    shown, report = collect(stop_tokens=[LETTERS.index(stop)])
    assert shown == [first.partition(stop)[0], second.partition(stop)[0]]
    assert report.finish == tuple(
        "stop token" if stop in text else "length" for text in (first, second)
    )
    assert report.tokens == tuple(len(text) for text in shown)


def test_one_token_has_no_speed():
    _, report = collect(max_new_tokens=1)
    assert report.tokens_per_second is None


def test_bad_input_is_refused_by_the_call():
    model, _ = texts()
    for prompts, stops, message in [
        ([], [], "there is no prompt"),
        (PROMPTS, [""], "A stop string is empty"),
    ]:
        with pytest.raises(UserError, match=message):
            stream_text(model, prompts, decoder=PairDecoder, stop_strings=stops, **SETTINGS)
