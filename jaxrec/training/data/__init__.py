"""Text for language models: corpora, tokenizers, split by document, token files, batches."""

from jaxrec.training.data.batches import Batches, HostBatch, prefetch
from jaxrec.training.data.corpora import (
    Document,
    corpus_sha256,
    python_docs,
    read_corpus,
    split_documents,
    text_files,
)
from jaxrec.training.data.loading import Data, load_data, write_data
from jaxrec.training.data.streams import TokenStream, tokenize
from jaxrec.training.data.tokenizers import (
    TOKENIZER_FILE,
    ByteTokenizer,
    HFTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
)

__all__ = [
    "TOKENIZER_FILE",
    "Batches",
    "ByteTokenizer",
    "Data",
    "Document",
    "HFTokenizer",
    "HostBatch",
    "StreamDecoder",
    "TokenStream",
    "Tokenizer",
    "corpus_sha256",
    "load_data",
    "load_tokenizer",
    "prefetch",
    "python_docs",
    "read_corpus",
    "split_documents",
    "text_files",
    "tokenize",
    "write_data",
]
