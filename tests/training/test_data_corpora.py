"""Corpora: what is read, under which names, and a split through which nothing leaks."""

import hashlib
import sys
import types
from pathlib import Path

import pytest

from jaxrec.errors import UserError
from jaxrec.training.data import (
    Document,
    corpora,
    corpus_sha256,
    python_docs,
    read_corpus,
    split_documents,
    text_files,
)


@pytest.fixture(scope="module")
def python_documents():
    return python_docs()


@pytest.fixture
def folder(tmp_path):
    """A folder with three text files and four things that are not text."""
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first é")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.txt").write_text("third")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "zeros.txt").write_bytes(b"a\0b")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    return tmp_path


def text_of(documents):
    return {document.name: document.text for document in documents}


def test_python_docs_hold_reference_docstrings_and_source(python_documents):
    texts = text_of(python_documents)
    kinds = {name.partition("/")[0] for name in texts}
    assert kinds | {"topic"} == {"topic", "docstrings", "source"}  # pydoc_data may be missing
    assert len(texts) == len(python_documents)  # names are unique
    assert texts["source/textwrap.py"].startswith(b'"""Text wrapping')
    assert texts["docstrings/textwrap.py"].startswith(b"Text wrapping")
    assert all(document.text for document in python_documents)


def test_python_docs_leave_out_tests_tables_and_paths_of_the_machine(python_documents):
    names = [document.name for document in python_documents]
    left_out = ["/test/", "/tests/", "/encodings/", "pydoc_data", "site-packages", "_sysconfigdata"]
    assert [name for name in names for part in left_out if part in name] == []


def test_python_docs_have_one_order(python_documents):
    sources = [document for document in python_documents if document.name.startswith("source/")]
    assert python_documents[-len(sources) :] == sources == list(corpora._standard_library())
    docstrings = [d.name.partition("/")[2] for d in python_documents if d.name[:3] == "doc"]
    in_order = [d.name.partition("/")[2] for d in sources]
    assert docstrings == [name for name in in_order if name in set(docstrings)]


def test_the_language_reference_is_one_document_per_topic(monkeypatch):
    topics = types.SimpleNamespace(topics={"while": "The while\n", "assert": "The assert\n"})
    monkeypatch.setitem(sys.modules, "pydoc_data", types.SimpleNamespace(topics=topics))
    assert corpora._topics() == [
        Document("topic/assert", b"The assert\n", "topic/assert"),
        Document("topic/while", b"The while\n", "topic/while"),
    ]


def test_a_python_without_the_language_reference_still_has_its_source(tmp_path, monkeypatch):
    (tmp_path / "module.py").write_text('"""Says hello."""\n')
    monkeypatch.setattr(corpora.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setitem(sys.modules, "pydoc_data", None)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert text_of(python_docs()) == {
        "docstrings/module.py": b"Says hello.\n",
        "source/module.py": b'"""Says hello."""\n',
    }
    (tmp_path / "module.py").unlink()
    with pytest.raises(UserError, match="neither pydoc_data nor the source"):
        python_docs()


def test_docstrings_come_in_the_order_of_the_file_and_without_indentation():
    source = b'''
"""Module."""
def f():
    """Does f.

    Twice.
    """
    def inner():
        "Inside."
    return lambda x: x
class C:
    """Class."""
    if True:
        async def g(self):
            """Does g \\d."""
        def no_docstring(self): ...
match f():
    case 1:
        def h():
            """Does h."""
'''
    assert list(corpora._docstrings_of(source)) == [
        "Module.",
        "Does f.\n\nTwice.",
        "Inside.",
        "Class.",
        "Does g \\d.",
        "Does h.",
    ]
    assert list(corpora._docstrings_of(b"print 'Python 2'")) == []


def test_a_folder_gives_its_text_files_sorted_by_relative_path(folder):
    assert [(d.name, d.text) for d in text_files(folder)] == [
        ("a.md", "first é".encode()),
        ("b.txt", b"second"),
        ("deep/c.txt", b"third"),
    ]


def test_a_glob_names_files_from_its_first_wildcard(folder):
    assert text_of(read_corpus(str(folder / "*.txt"))) == {"b.txt": b"second"}
    assert text_of(read_corpus(str(folder / "**" / "*.txt"))) == {
        "b.txt": b"second",
        "deep/c.txt": b"third",
    }


def test_a_single_file_is_taken_as_it_is(folder):
    assert text_of(read_corpus(folder / "latin.txt")) == {"latin.txt": b"caf\xe9"}


def test_names_that_are_not_unicode_are_names_too(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}\udcff.txt").write_text(f"text {i}")  # the byte 0xff in the file system
    documents = text_files(tmp_path)
    assert len(documents) == 30
    assert len(corpus_sha256(documents)) == 64
    assert sum(map(len, split_documents(documents, 0.2))) == 30


def test_a_name_with_brackets_is_a_file_first(tmp_path):
    (tmp_path / "[a].txt").write_text("text")
    assert text_of(text_files(tmp_path / "[a].txt")) == {"[a].txt": b"text"}


@pytest.mark.parametrize(
    "source, message",
    [
        ("python-doc", "no corpus, file or folder 'python-doc'.*Did you mean python-docs"),
        ("nowhere/text.txt", "no corpus, file or folder.*Give python-docs, a text file"),
        ("", "no corpus, file or folder ''"),
        ("a" * 300, "no corpus, file or folder 'aaa"),
        ("*.nothing", "No file matches '.*nothing'"),
        ("empty.txt", "empty.txt is empty. Expected a file with text"),
        ("[el]*.txt", "holds no text: of 2 files none"),
        (".git/hooks", "holds no text: of 0 files"),
    ],
)
def test_sources_without_text_are_named(folder, monkeypatch, source, message):
    (folder / ".git" / "hooks").mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message) as error:
        read_corpus(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["b.txt", "."])
def test_a_file_that_cannot_be_read_is_named(folder, monkeypatch, source):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"(b\.txt|a\.md) is not readable: Permission denied"):
        read_corpus(folder / source)


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    def walk(root, onerror):
        onerror(PermissionError(13, "Permission denied", f"{root}/deep"))

    monkeypatch.setattr(corpora.os, "walk", walk)
    with pytest.raises(UserError, match="deep is not readable: Permission denied"):
        read_corpus(folder)


def test_the_hash_is_over_names_and_texts():
    expected = hashlib.sha256()
    for part in (b"a", b"xy", b"b", b""):
        expected.update(len(part).to_bytes(8, "little") + part)
    documents = [Document("a", b"xy", "k"), Document("b", b"", "k")]
    assert corpus_sha256(documents) == expected.hexdigest()
    assert corpus_sha256([Document("ax", b"y", "k"), documents[1]]) != expected.hexdigest()


def test_no_module_of_python_docs_is_on_both_sides(python_documents):
    train, valid = split_documents(python_documents, 0.05)
    assert sorted(d.name for d in train + valid) == sorted(d.name for d in python_documents)
    assert {d.split_key for d in train}.isdisjoint(d.split_key for d in valid)
    assert {d.text for d in train}.isdisjoint(d.text for d in valid)
    share = len({d.split_key for d in valid}) / len({d.split_key for d in python_documents})
    # 552 keys: the standard deviation of the share is sqrt(0.05 * 0.95 / 552) = 0.009
    assert 0.05 - 4 * 0.009 < share < 0.05 + 4 * 0.009


def test_a_document_goes_by_the_hash_of_its_key():
    documents = [Document(f"n{i}", f"text {i}".encode(), f"k{i}") for i in range(200)]
    train, valid = split_documents(documents, 0.2)
    for i, document in enumerate(documents):
        digest = hashlib.sha256(f"0:k{i}".encode()).digest()
        assert (document in valid) == (int.from_bytes(digest[:6], "big") < 0.2 * 2**48)
    assert train == [d for d in documents if d not in valid]  # in order
    fewer, _ = split_documents(documents[::2], 0.2)
    assert set(fewer) == set(train) & set(documents[::2])  # whatever else is there
    assert split_documents(documents, 0.2, seed=1)[1] != valid


def test_documents_linked_by_key_or_text_go_together():
    documents = [
        Document(f"{i}/{part}", f"text {i + (part == 'b')}".encode(), f"key {i}/{part == 'c'}")
        for i in range(0, 200, 2)
        for part in "abc"
    ]  # a and b share a key, a and c a text
    train, valid = split_documents(documents, 0.3)
    sides = [{d.name.split("/")[0] for d in side} for side in (train, valid)]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[0]) + len(sides[1]) == 100


@pytest.mark.parametrize(
    "texts, train, valid",
    [
        ([b"0123456789"], [b"01234567"], [b"89"]),
        ([b"01234", b"56789"], [b"01234", b"567"], [b"89"]),
        ([b"12345678", b"9", b"0"], [b"12345678"], [b"9", b"0"]),
        ([b"0123456789", b"0123456789"], [b"01234567"], [b"89"]),  # the copy would leak
        (["0123456é9".encode()], [b"0123456"], ["é9".encode()]),  # not inside a character
    ],
)
def test_too_few_documents_are_cut_at_the_tail(monkeypatch, texts, train, valid):
    monkeypatch.setattr(corpora, "_uniform", lambda key: 0.9)  # all on the training side
    documents = [Document(str(i), text, str(i)) for i, text in enumerate(texts)]
    left, right = split_documents(documents, 0.2)
    assert [d.text for d in left] == train
    assert [d.text for d in right] == valid


def test_one_byte_cannot_be_split():
    with pytest.raises(UserError, match=r"text \(1 bytes\) is too short to split"):
        split_documents([Document("a", b"x", "a")], 0.2)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 0.51, float("nan")])
def test_the_fraction_is_checked(fraction):
    with pytest.raises(UserError, match=r"valid_fraction must be above 0 and at most 0\.5; got"):
        split_documents([Document("a", b"text", "a")], fraction)
