"""From the name of a corpus to token streams, with a record of where they are from."""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrec.errors import UserError
from jaxrec.training.data.corpora import (
    PYTHON_DOCS,
    check_fraction,
    corpus_sha256,
    read_corpus,
    split_documents,
)
from jaxrec.training.data.storage import (
    check_new_folder,
    is_data_folder,
    read_streams,
    write_streams,
)
from jaxrec.training.data.streams import TokenStream, tokenize
from jaxrec.training.data.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Data:
    """What a model is trained and judged on.

    Attributes:
      train: token stream to train on.
      valid: token stream of other documents.
      tokenizer: what made the tokens.
      provenance: source, sha256 of the corpus, Python version (for python-docs), tokenizer,
        valid_fraction, and documents, bytes and tokens of each side; values that JSON can hold.
        Never compare bits per byte between two values of sha256.
    """

    train: TokenStream
    valid: TokenStream
    tokenizer: Tokenizer
    provenance: dict[str, Any]


def load_data(
    source: str | Path = PYTHON_DOCS, tokenizer: str | Path = "bytes", valid_fraction: float = 0.05
) -> Data:
    """Returns the training and validation tokens of a source.

    Args:
      source: 'python-docs', a text file, a folder of text files, a glob, or a folder made by
        `jaxrec data`. The last is mapped into memory; its own tokenizer and split hold.
      tokenizer: 'bytes', a `tokenizer.json` or a folder that holds one.
      valid_fraction: share of the documents kept for validation, in (0, 0.5].

    Raises:
      UserError: the source or the tokenizer is missing or broken, or the tokenizer is another one
        than that of the data folder.
    """
    folder = Path(source).expanduser()
    if is_data_folder(folder):
        return _load_folder(folder, tokenizer)
    check_fraction(valid_fraction)
    encoder = load_tokenizer(tokenizer)
    documents = read_corpus(source)
    train, valid = split_documents(documents, valid_fraction)
    streams = {"train": tokenize(train, encoder), "valid": tokenize(valid, encoder)}
    provenance: dict[str, Any] = {"source": str(source), "sha256": corpus_sha256(documents)}
    if str(source) == PYTHON_DOCS:
        provenance["python"] = platform.python_version()
    provenance |= {
        "tokenizer": encoder.name,
        "valid_fraction": valid_fraction,
        "documents": {side: len(stream.starts) for side, stream in streams.items()},
        "bytes": {side: stream.num_bytes for side, stream in streams.items()},
        "tokens": {side: len(stream.tokens) for side, stream in streams.items()},
    }
    return Data(streams["train"], streams["valid"], encoder, provenance)


def write_data(
    source: str | Path,
    out: str | Path,
    tokenizer: str | Path = "bytes",
    valid_fraction: float = 0.05,
) -> Data:
    """Tokenises a source into the new folder `out`, for `load_data(out)`; returns what was written.

    Raises:
      UserError: as `load_data`; or `out` is not empty or cannot be written.
    """
    out = Path(out).expanduser()
    check_new_folder(out)  # before minutes of work
    data = load_data(source, tokenizer, valid_fraction)
    write_streams(out, {"train": data.train, "valid": data.valid}, data.tokenizer, data.provenance)
    return data


def _load_folder(folder: Path, tokenizer: str | Path) -> Data:
    streams, own, provenance = read_streams(folder)
    usual = str(tokenizer) in ("bytes", provenance.get("tokenizer"), own.name)
    if not usual and load_tokenizer(tokenizer).sha256 != own.sha256:
        raise UserError(
            f"{folder} was made with the tokenizer {provenance.get('tokenizer')!r}, "
            f"not {str(tokenizer)!r}. "
            "Leave the tokenizer out, or make a folder with the other one: jaxrec data"
        )
    return Data(streams["train"], streams["valid"], own, provenance | {"folder": str(folder)})
