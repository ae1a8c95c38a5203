"""Text to train on: what ships with Python, and the user's own files, as documents.

A document is the unit of the split into training and validation, and where the model's memory
starts anew. Documents that say the same thing (a module's docstrings and its source, two copies of
a file) share a side of the split, so that the validation text is really unseen.
"""

import ast
import glob
import hashlib
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jaxrec.errors import UserError, nearest

PYTHON_DOCS = "python-docs"
BUILT_IN = (PYTHON_DOCS,)

# Folders of the standard library that are left out: tests and their data, an editor, a parser's
# fixtures, tables of code points, other people's packages, and (pydoc_data) the source of the
# language reference, which is read as text instead. `config-*` and `_sysconfigdata*` hold the paths
# of the machine that compiled Python.
_SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "encodings"}
_SKIPPED_FOLDERS |= {"site-packages", "dist-packages", "pydoc_data", "__pycache__"}
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


@dataclass(frozen=True)
class Document:
    """A text that begins with an empty memory.

    Attributes:
      name: what it is called in the corpus, independent of the machine; part of the corpus hash.
      text: its bytes, usually UTF-8.
      split_key: documents of one key lie on the same side of the split.
    """

    name: str
    text: bytes
    split_key: str


def read_corpus(source: str | Path) -> list[Document]:
    """Returns the documents of a built-in corpus ('python-docs'), a file, a folder or a glob.

    Raises:
      UserError: there is no such source, it cannot be read, or it holds no text.
    """
    if str(source) == PYTHON_DOCS:
        return python_docs()
    return text_files(source)


def corpus_sha256(documents: Sequence[Document]) -> str:
    """Returns the SHA-256 over the names and texts of the documents, in order, as hexadecimal."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.name.encode(errors="surrogateescape"), document.text):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


def python_docs() -> list[Document]:
    """Returns English and code that is on every machine: the text of the running Python.

    These are, in this order: the topics of the language reference (`pydoc_data.topics`), the
    docstrings of each module of the standard library (one document per module) and the source of
    each module. What a distribution leaves out is missing here too. The text depends on the Python
    version, so figures of different versions must not be compared: see `corpus_sha256`. About 11 MB
    and 3 seconds. Licence: PSF.

    Raises:
      UserError: neither the language reference nor the source of the standard library is installed.
    """
    sources = list(_standard_library())
    documents = _topics() + _docstrings(sources) + sources
    if not documents:
        raise UserError(
            f"{PYTHON_DOCS}: this Python has neither pydoc_data nor the source of its standard "
            f"library (looked in {sysconfig.get_paths()['stdlib']}). "
            "Give a text file, a folder or a glob instead."
        )
    return documents


def text_files(pattern: str | Path) -> list[Document]:
    """Returns the text files of a file, a folder (with its subfolders) or a glob (`**` recurses).

    A single file is taken as it is, whatever its bytes. In folders and globs a file counts as text
    when it is valid UTF-8 without a zero byte; other files, empty files, and files or folders whose
    name begins with a dot are left out. Documents are named by their path relative to the folder
    (or to the part of the glob before the first wildcard) and sorted by that name.

    Raises:
      UserError: nothing is there, something cannot be read, or there is no text in it.
    """
    path = Path(pattern).expanduser()
    if os.path.isfile(path):  # False, not an error, where the name is impossible
        text = _read(path)
        if not text:
            raise UserError(f"{path} is empty. Expected a file with text to train on.")
        return [Document(path.name, text, path.name)]
    if os.path.isdir(path) and str(pattern):
        root, files = path, _files_below(path)
    elif glob.has_magic(str(path)):
        root = _fixed_part(path)
        files = [Path(name) for name in glob.glob(str(path), recursive=True)]
        if not files:
            raise UserError(
                f"No file matches {str(path)!r}. Check the pattern; ** matches subfolders."
            )
    else:
        hint = nearest(str(pattern), BUILT_IN)
        raise UserError(
            f"There is no corpus, file or folder {str(pattern)!r}.{hint}"
            f" Give {', '.join(BUILT_IN)}, a text file, a folder or a glob."
        )
    named = sorted(
        (file.relative_to(root).as_posix(), file) for file in files if os.path.isfile(file)
    )
    texts = ((name, _read(file)) for name, file in named)
    documents = [Document(name, text, name) for name, text in texts if text and _is_text(text)]
    if not documents:
        raise UserError(
            f"{path} holds no text: of {len(named)} files none is non-empty UTF-8 "
            "without zero bytes."
        )
    return documents


def split_documents(
    documents: Sequence[Document], valid_fraction: float, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Splits documents into training and validation so that no text is in both.

    A document goes by the SHA-256 of the seed and its split key: the same side on every machine,
    and whatever else is in the corpus. Documents linked by a common key or by identical text go
    together. The validation side therefore holds about `valid_fraction` of the keys. Where one side
    would be empty (a single document, too few keys), the end of the corpus is cut off instead: its
    last `valid_fraction` bytes, moved back to the beginning of a UTF-8 character; repeated
    documents are then dropped.

    Args:
      documents: the corpus, in order; the order is kept on both sides.
      valid_fraction: share of the validation side, dimensionless, in (0, 0.5].
      seed: another seed is another split.

    Returns:
      The training documents and the validation documents.

    Raises:
      UserError: the fraction is out of range or the text is too short to cut.
    """
    check_fraction(valid_fraction)
    groups = _linked(documents)
    valid_groups = {group for group in groups if _uniform(f"{seed}:{group}") < valid_fraction}
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document, group in zip(documents, groups, strict=True):
        sides[group in valid_groups].append(document)
    return sides if all(sides) else _cut_tail(documents, valid_fraction)


def check_fraction(valid_fraction: float) -> None:
    """Raises UserError unless the validation fraction is in (0, 0.5]."""
    if not 0 < valid_fraction <= 0.5:
        raise UserError(f"valid_fraction must be above 0 and at most 0.5; got {valid_fraction}.")


def _topics() -> list[Document]:
    """The language reference: one document per topic of Python's `help()`."""
    try:
        from pydoc_data import topics
    except ImportError:  # some distributions package it apart
        return []
    return [
        Document(f"topic/{name}", text.encode(), f"topic/{name}")
        for name, text in sorted(topics.topics.items())
    ]


def _standard_library() -> Iterator[Document]:
    """The non-empty source files of the standard library, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            name
            for name in folders
            if name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_PREFIXES)
        )
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith(_SKIPPED_PREFIXES):
                path = Path(folder, name)
                module = path.relative_to(root).as_posix()
                if text := _read(path):
                    yield Document(f"source/{module}", text, f"module/{module}")


def _docstrings(sources: Sequence[Document]) -> list[Document]:
    """One document per module that has docstrings: these, a blank line between two."""
    documents = []
    for source in sources:
        text = "\n\n".join(_docstrings_of(source.text))
        if text:
            name = source.name.replace("source/", "docstrings/", 1)
            documents.append(
                Document(name, (text + "\n").encode(errors="replace"), source.split_key)
            )
    return documents


def _docstrings_of(source: bytes) -> Iterator[str]:
    """The docstrings of a module, its classes and its functions, in the order of the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules hold invalid escapes
            module = ast.parse(source)
    except (SyntaxError, ValueError):
        return  # a file for another version of Python
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    waiting: list[ast.AST] = [module]
    while waiting:  # statements only: ast.walk would spend its time in expressions
        node = waiting.pop()
        if isinstance(node, documented):
            docstring = ast.get_docstring(node, clean=False)
            if docstring and docstring.strip():
                yield inspect.cleandoc(docstring)
        for field in ("cases", "finalbody", "orelse", "handlers", "body"):
            children = getattr(node, field, None)
            if isinstance(children, list):  # the body of a lambda is an expression
                waiting.extend(reversed(children))


def _files_below(root: Path) -> list[Path]:
    """The files of a folder and its subfolders; names that begin with a dot are left out."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} is not readable: {error.strerror}.") from error

    files = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return files


def _fixed_part(pattern: Path) -> Path:
    """The leading folders of a glob that hold no wildcard."""
    parts = list(pattern.parts)
    magic = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:magic])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} is not readable: {error.strerror}. Check its permissions."
        ) from error


def _is_text(data: bytes) -> bool:
    if b"\0" in data:
        return False
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _linked(documents: Sequence[Document]) -> list[str]:
    """For each document the one key of all documents linked to it by a split key or their text."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    first_key: dict[bytes, str] = {}
    for document in documents:
        text = hashlib.sha256(document.text).digest()
        one, other = root(document.split_key), root(first_key.setdefault(text, document.split_key))
        parent[max(one, other)] = min(one, other)  # whatever the order of the documents
    return [root(document.split_key) for document in documents]


def _uniform(key: str) -> float:
    """A number in [0, 1) that is a function of the key alone."""
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _cut_tail(
    documents: Sequence[Document], valid_fraction: float
) -> tuple[list[Document], list[Document]]:
    """Cuts the corpus once, before its last `valid_fraction` bytes."""
    first: dict[bytes, Document] = {}
    for document in documents:
        first.setdefault(document.text, document)
    documents = list(first.values())
    remaining = max(1, round(valid_fraction * sum(len(document.text) for document in documents)))
    train = list(documents)
    valid: list[Document] = []
    while train and remaining > 0:
        last = train.pop()
        cut = max(0, len(last.text) - remaining)
        while cut > 0 and last.text[cut] & 0xC0 == 0x80:  # inside a UTF-8 character
            cut -= 1
        valid.insert(0, replace(last, text=last.text[cut:]))
        if cut > 0:
            train.append(replace(last, text=last.text[:cut]))
        remaining -= len(valid[0].text)
    if not train:
        size = sum(len(document.text) for document in documents)
        raise UserError(
            f"The text ({size} bytes) is too short to split into training and validation."
        )
    return train, valid
