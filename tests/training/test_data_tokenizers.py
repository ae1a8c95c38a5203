"""Tokenizers: nothing is lost between text and ids, and text streams out by whole characters."""

import json
import sys

import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.training.data import (
    ByteTokenizer,
    HFTokenizer,
    StreamDecoder,
    load_tokenizer,
    tokenize,
)
from jaxrec.training.data.corpora import Document

TEXT = "def f(x):\n    return 'naïve 🦊 日本'\n"


def train_tokenizer(path, special=("<|endoftext|>", "<s>"), vocab_size=300):
    """Writes a byte-level BPE tokenizer.json, as GPT-2's is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def return the in x " * 20, TEXT], trainer)
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def test_bytes_are_their_own_ids():
    tokenizer = load_tokenizer("bytes")
    assert isinstance(tokenizer, ByteTokenizer)
    assert (tokenizer.vocab_size, tokenizer.bos) == (257, 256)
    assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    every_byte = bytes(range(256))
    ids = tokenizer.encode(every_byte)
    assert ids.tolist() == list(range(256))
    assert tokenizer.decode([256, *ids, 256]) == every_byte  # bos vanishes


def test_a_hugging_face_tokenizer_loses_nothing(tokenizer_file):
    tokenizer = load_tokenizer(tokenizer_file)
    ids = tokenizer.encode(TEXT)
    assert len(ids) < len(TEXT.encode())
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == TEXT.encode()
    assert tokenizer.encode(TEXT.encode()).tolist() == ids.tolist()
    assert tokenizer.decode([tokenizer.bos, *ids]) == TEXT.encode()  # specials vanish
    assert load_tokenizer(tokenizer_file.parent).encode(TEXT).tolist() == ids.tolist()


def test_bos_is_the_configured_one_then_a_usual_name_then_none(tmp_path):
    usual = HFTokenizer(train_tokenizer(tmp_path / "tokenizer.json", ["<|endoftext|>", "<s>"]))
    assert usual.bos == 1
    config = tmp_path / "tokenizer_config.json"
    for bos_token in ("<|endoftext|>", {"content": "<|endoftext|>"}):
        config.write_text(json.dumps({"bos_token": bos_token}))
        assert HFTokenizer(tmp_path).bos == 0
    config.write_text("not json")
    assert HFTokenizer(tmp_path).bos == 1
    assert HFTokenizer(train_tokenizer(tmp_path / "other.json", [])).bos is None


def test_eos_is_found_like_bos(tmp_path):
    usual = HFTokenizer(train_tokenizer(tmp_path / "tokenizer.json", ["<s>", "<pad>", "</s>"]))
    assert (usual.bos, usual.eos) == (0, 2)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<pad>"}))
    assert HFTokenizer(tmp_path).eos == 1
    assert HFTokenizer(train_tokenizer(tmp_path / "other.json", [])).eos is None


@pytest.mark.parametrize("text", [TEXT, "", "plain", "🦊🦊", "\ufffd"])
@pytest.mark.parametrize("spec", ["bytes", "hf"])
def test_text_streams_out_by_whole_characters(tokenizer_file, spec, text):
    tokenizer = load_tokenizer(tokenizer_file if spec == "hf" else spec)
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(int(index)) for index in tokenizer.encode(text)]
    assert "".join(pieces) + decoder.flush() == text
    if text != "\ufffd":
        assert "\ufffd" not in "".join(pieces)


def test_a_character_is_held_back_until_it_is_complete():
    decoder = StreamDecoder(ByteTokenizer())
    pieces = [decoder.push(byte) for byte in "a🦊b".encode()]
    assert pieces == ["a", "", "", "", "🦊", "b"]


@pytest.mark.parametrize(
    "data, pieces, rest",
    [
        (b"\xffa", ["\ufffd", "a"], ""),  # never valid
        (b"\xf0\x9fa", ["", "", "\ufffda"], ""),  # broken off
        (b"a\xf0\x9f", ["a", "", ""], "\ufffd"),  # ends inside a character
    ],
)
def test_bytes_that_are_no_text_become_replacement_characters(data, pieces, rest):
    decoder = StreamDecoder(ByteTokenizer())
    assert [decoder.push(byte) for byte in data] == pieces
    assert decoder.flush() == rest
    assert decoder.push(ord("x")) == "x"  # begins anew


def test_replacement_characters_of_a_hugging_face_tokenizer_are_not_held_forever(tokenizer_file):
    tokenizer = load_tokenizer(tokenizer_file)
    fox = tokenizer.encode("🦊").tolist()
    assert len(fox) > 1
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(fox[0]) for _ in range(8)]
    assert pieces[0] == ""
    assert "\ufffd" in "".join(pieces)


def test_a_stream_marks_where_documents_begin():
    documents = [
        Document(name, text, name) for name, text in [("a", b"ab"), ("b", b""), ("c", b"c")]
    ]
    stream = tokenize(documents, ByteTokenizer())
    assert stream.tokens.tolist() == [256, 97, 98, 256, 99]
    assert stream.tokens.dtype == np.uint16
    assert stream.starts.tolist() == [0, 3]  # the empty document is left out
    assert (stream.num_bytes, stream.vocab_size) == (3, 257)


def test_a_stream_without_bos_begins_documents_with_their_text(tmp_path):
    tokenizer = HFTokenizer(train_tokenizer(tmp_path / "tokenizer.json", []))
    documents = [Document(name, TEXT.encode(), name) for name in "ab"]
    stream = tokenize(documents, tokenizer)
    ids = tokenizer.encode(TEXT).tolist()
    assert stream.tokens.tolist() == ids + ids
    assert stream.starts.tolist() == [0, len(ids)]
    assert stream.num_bytes == 2 * len(TEXT.encode())


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "There is no tokenizer '.*tokenizer.json'.*Give 'bytes', a tokenizer.json"),
        ("{", "tokenizer.json is not a tokenizer that the tokenizers package can read"),
        ("{}", "tokenizer.json is not a tokenizer"),
        ("", "tokenizer.json is not a tokenizer"),
    ],
)
def test_files_that_are_no_tokenizer_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(error.value)


def test_a_misspelt_tokenizer_gets_a_hint():
    with pytest.raises(UserError, match=r"no tokenizer 'byte'. Did you mean bytes"):
        load_tokenizer("byte")


def test_without_the_extra_the_message_says_how_to_install_it(tokenizer_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'jaxrec\[hf\]'"):
        load_tokenizer(tokenizer_file)
