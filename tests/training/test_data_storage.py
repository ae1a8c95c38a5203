"""Data folders: written whole or not at all, read as they were, and damage is named."""

import json
import platform

import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.training.data import (
    Batches,
    Document,
    corpus_sha256,
    load_data,
    loading,
    storage,
    write_data,
)

TEXTS = {f"{i}.txt": f"text number {i} ".encode() * (i + 1) for i in range(40)}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_bytes(text)
    return folder


@pytest.fixture
def out(source, tmp_path):
    folder = tmp_path / "tokens"
    write_data(source, folder, valid_fraction=0.2)
    return folder


def write_tokenizer(path, words):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


def test_text_files_become_streams_with_their_provenance(source):
    data = load_data(source, valid_fraction=0.2)
    documents = [Document(name, TEXTS[name], name) for name in sorted(TEXTS)]
    assert data.provenance["sha256"] == corpus_sha256(documents)
    assert data.provenance["source"] == str(source)
    assert "python" not in data.provenance
    for side, stream in (("train", data.train), ("valid", data.valid)):
        assert data.provenance["documents"][side] == len(stream.starts) > 0
        assert data.provenance["bytes"][side] == stream.num_bytes
        assert data.provenance["tokens"][side] == len(stream.tokens)
        assert (stream.tokens[stream.starts] == data.tokenizer.bos).all()
    assert data.train.num_bytes + data.valid.num_bytes == sum(map(len, TEXTS.values()))
    assert json.loads(json.dumps(data.provenance)) == data.provenance


def test_python_docs_say_which_python(monkeypatch):
    documents = [Document(f"{i}", b"text" * (i + 1), f"{i}") for i in range(40)]
    monkeypatch.setattr(loading, "read_corpus", lambda source: documents)
    assert load_data("python-docs").provenance["python"] == platform.python_version()


def test_a_data_folder_gives_the_same_streams_from_disk(source, out):
    direct, mapped = load_data(source, valid_fraction=0.2), load_data(out)
    for one, other in ((direct.train, mapped.train), (direct.valid, mapped.valid)):
        assert isinstance(other.tokens, np.memmap)
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.starts, other.starts)
        assert (one.num_bytes, one.vocab_size) == (other.num_bytes, other.vocab_size)
    assert mapped.provenance == direct.provenance | {"folder": str(out)}
    one, other = (Batches(data.train, batch=4, time=16, seed=2)(5) for data in (direct, mapped))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_a_data_folder_holds_its_tokenizer(source, tmp_path):
    path = write_tokenizer(tmp_path / "words.json", ["text", "number", *map(str, range(40))])
    direct = write_data(source, tmp_path / "out", path, 0.2)
    path.unlink()
    mapped = load_data(tmp_path / "out")
    assert mapped.tokenizer.bos == 1
    assert mapped.train.vocab_size == 44
    np.testing.assert_array_equal(mapped.train.tokens, direct.train.tokens)
    assert mapped.tokenizer.decode(mapped.valid.tokens[:3]).startswith(b"text number")
    assert load_data(tmp_path / "out", str(path)).tokenizer.name == mapped.tokenizer.name
    other = write_tokenizer(tmp_path / "other.json", ["text"])
    with pytest.raises(UserError, match=r"made with the tokenizer .*, not '.*other.json'"):
        load_data(tmp_path / "out", other)


def test_an_empty_folder_may_be_filled(source, tmp_path):
    (tmp_path / "out").mkdir()
    write_data(source, tmp_path / "out", valid_fraction=0.2)
    assert load_data(tmp_path / "out").train.num_bytes > 0


def test_a_folder_that_holds_something_is_left_alone(source, out):
    before = (out / "train.bin").read_bytes()
    with pytest.raises(UserError, match=r"tokens exists and is not empty. Give the name of a new"):
        write_data(source, out)
    assert (out / "train.bin").read_bytes() == before
    with pytest.raises(UserError, match=r"train.bin is a file. Give the name of a new folder"):
        write_data(source, out / "train.bin")


def test_a_folder_below_a_file_cannot_be_made(source):
    with pytest.raises(UserError, match=r"new cannot be made: "):
        write_data(source, source / "0.txt" / "new")


def test_a_full_disk_leaves_nothing_behind(source, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.np, "save", full)
    with pytest.raises(UserError, match=r"could not be written: No space left on device"):
        write_data(source, tmp_path / "out", valid_fraction=0.2)
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit_meta(**changes):
    def edit(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("train.bin", lambda path: path.unlink(), "train.bin is missing"),
        ("train.bin", flip, "train.bin does not hold what was written"),
        ("valid.starts.npy", flip, "valid.starts.npy does not hold|valid.starts.npy was cut"),
        ("train.bin", cut, r"train.bin has \d+ bytes; meta.json says \d+ tokens of uint16"),
        ("valid.starts.npy", lambda path: path.unlink(), "valid.starts.npy is missing"),
        ("valid.starts.npy", cut, "valid.starts.npy was cut short or is not an array"),
        ("valid.starts.npy", lambda path: path.write_bytes(b""), "starts.npy was cut short"),
        (
            "valid.starts.npy",
            lambda path: np.save(path, np.zeros(3)),
            r"valid.starts.npy does not hold the \d+ positions",
        ),
        (
            "valid.starts.npy",
            lambda path: np.save(path, np.load(path)[::-1]),
            "valid.starts.npy does not hold increasing positions",
        ),
        (
            "valid.starts.npy",
            lambda path: np.save(path, np.array([{}]), allow_pickle=True),
            "starts.npy was cut short or is not an array",
        ),
        ("meta.json", lambda path: path.unlink(), "meta.json: No such file"),
        ("meta.json", cut, "meta.json: it is not JSON"),
        ("meta.json", lambda path: path.write_text("[]"), "does not describe a data folder"),
        ("meta.json", edit_meta(format="other"), "does not describe a data folder"),
        ("meta.json", edit_meta(version=1), "has version 1, this jaxrec reads version 2"),
        ("meta.json", edit_meta(vocab_size="many"), "expected vocab_size to be of type int"),
        ("meta.json", edit_meta(vocab_size=300), "tokenizer has 257 ids, meta.json says 300"),
        ("meta.json", edit_meta(dtype="uint32"), "train.bin has .* tokens of uint32"),
        ("meta.json", edit_meta(tokens={"train": 3}), "a number for train and for valid in tokens"),
        ("meta.json", edit_meta(tokenizer="words.json"), "no tokenizer '.*tokenizer.json'"),
    ],
)
def test_damage_is_named(out, name, damage, message):
    damage(out / name)
    with pytest.raises(UserError, match=message) as error:
        load_data(out)
    assert "\n" not in str(error.value)


def test_a_folder_of_texts_may_hold_a_meta_json_of_its_own(source):
    (source / "meta.json").write_text('{"title": "texts"}')
    assert load_data(source, valid_fraction=0.2).provenance["source"] == str(source)


def test_the_fraction_is_checked_before_the_text_is_read(tmp_path):
    with pytest.raises(UserError, match=r"valid_fraction must be above 0 and at most 0\.5; got 0"):
        load_data(tmp_path / "nowhere", valid_fraction=0)
