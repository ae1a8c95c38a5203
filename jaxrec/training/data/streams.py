"""A corpus as one long array of tokens, and where its documents begin."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxrec.training.data.corpora import Document
from jaxrec.training.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class TokenStream:
    """Documents one after the other, each beginning with the tokenizer's `bos` where it has one.

    Attributes:
      tokens: ids, uint16 or uint32 (n,), in memory or mapped from a file.
      starts: position of the first token of each document, int64 (documents,), increasing from 0.
      num_bytes: bytes of text, `bos` not counted: the denominator of bits per byte.
      vocab_size: ids are 0 .. vocab_size - 1.
    """

    tokens: np.ndarray
    starts: np.ndarray
    num_bytes: int
    vocab_size: int


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer) -> TokenStream:
    """Returns the token stream of documents, in order; a document without tokens is left out."""
    dtype = token_dtype(tokenizer.vocab_size)
    begin = np.array([] if tokenizer.bos is None else [tokenizer.bos], dtype)
    parts: list[np.ndarray] = []
    lengths = []
    for document in documents:
        ids = tokenizer.encode(document.text)
        if len(ids) > 0:
            parts += [begin, ids.astype(dtype, copy=False)]
            lengths.append(len(begin) + len(ids))
    return TokenStream(
        tokens=np.concatenate(parts) if parts else np.zeros(0, dtype),
        starts=np.cumsum([0, *lengths], dtype=np.int64)[:-1],
        num_bytes=sum(len(document.text) for document in documents),
        vocab_size=tokenizer.vocab_size,
    )
