"""Text to token ids and back: bytes as they are, or a Hugging Face `tokenizer.json`.

Every tokenizer has the same few members (see `Tokenizer`); `load_tokenizer` makes one from its
name.
"""

import codecs
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxrec.config import read_json
from jaxrec.errors import UserError, nearest

TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_BOS = 256
# What open models call the token that begins a document, the surest first; the last is GPT-2's
# separator.
_BOS_NAMES = (
    "<|begin_of_text|>",
    "<bos>",
    "<s>",
    "[BOS]",
    "<|bos|>",
    "<|startoftext|>",
    "<|endoftext|>",
)
_EOS_NAMES = (
    "<|end_of_text|>",
    "<|end_text|>",
    "<eos>",
    "</s>",
    "[EOS]",
    "<|eos|>",
    "<|endoftext|>",
)


class Tokenizer(Protocol):
    """What every tokenizer has.

    Attributes:
      name: how `load_tokenizer` finds it again: 'bytes', or a path.
      vocab_size: ids are 0 .. vocab_size - 1.
      bos: the id that begins a document, or None.
      eos: the id that ends one, or None; where documents were only begun, the same as bos or None.
      concatenative: the decoding of a sequence is the concatenation of the decoded tokens.
      sha256: equal for tokenizers that are the same, wherever their files lie.
    """

    name: str
    vocab_size: int
    bos: int | None
    eos: int | None
    concatenative: bool
    sha256: str

    def encode(self, text: str | bytes) -> np.ndarray:
        """Returns the ids of a text, (t,), without `bos`."""
        ...

    def decode(self, ids: Iterable[int]) -> bytes:
        """Returns the text of ids; special tokens vanish."""
        ...

    def save(self, folder: Path) -> None:
        """Copies the files it was read from, if any; `load_tokenizer(folder)` then reads them."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are bytes and 256 begins a document. Loses nothing and needs no file."""

    name = "bytes"
    vocab_size = 257
    bos: int | None = _BOS
    eos: int | None = None
    concatenative = True
    sha256 = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str | bytes) -> np.ndarray:
        """Returns the bytes of a text (UTF-8 for a string), uint16 (t,)."""
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes of ids; everything from 256 on vanishes."""
        array = ids if isinstance(ids, np.ndarray) else np.array(list(ids), np.int64)
        return array[(array >= 0) & (array < _BOS)].astype(np.uint8).tobytes()

    def save(self, folder: Path) -> None:
        """Has no file."""


class HFTokenizer:
    """A Hugging Face fast tokenizer: a `tokenizer.json`, or a folder that holds one.

    Needs the extra `hf`. The token that begins a document is what `tokenizer_config.json` beside it
    calls `bos_token`, else the first of the usual names in the vocabulary, else there is none; the
    token that ends one likewise, by `eos_token`.

    Raises:
      UserError: the extra is not installed, the file is missing, or it is not a tokenizer.
    """

    concatenative = False  # spaces and broken characters depend on the neighbours

    def __init__(self, path: str | Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f"{path}: a tokenizer.json needs the package tokenizers. "
                "Do: pip install 'jaxrec[hf]'"
            ) from error
        self.path = _tokenizer_file(path)
        self.name = str(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # the package raises plain Exception
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{self.path} is not a tokenizer that the tokenizers package can read ({reason}). "
                "Expected the tokenizer.json of a Hugging Face fast tokenizer."
            ) from error
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"{self.path} has an empty vocabulary. Expected a trained tokenizer.")
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        self.bos: int | None = self._special(vocabulary, "bos_token", _BOS_NAMES)
        self.eos: int | None = self._special(vocabulary, "eos_token", _EOS_NAMES)

    def _special(self, vocabulary: dict[str, int], kind: str, usual: tuple[str, ...]) -> int | None:
        names = (_configured(self.path.parent, kind), *usual)
        return next((vocabulary[name] for name in names if name in vocabulary), None)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Returns the ids of a text, uint32 (t,); bytes that are not UTF-8 become U+FFFD."""
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode(self, ids: Iterable[int]) -> bytes:
        """Returns the text of ids as UTF-8; special tokens and ids beyond the vocabulary vanish."""
        # the file need not call its bos special
        known = [int(index) for index in ids if 0 <= index < self.vocab_size and index != self.bos]
        return self._tokenizer.decode(known, skip_special_tokens=True).encode()

    def save(self, folder: Path) -> None:
        """Copies tokenizer.json, and the tokenizer_config.json beside it, which names the bos."""
        for name, file in {
            TOKENIZER_FILE: self.path,
            _CONFIG_FILE: self.path.with_name(_CONFIG_FILE),
        }.items():
            if file.is_file() and file.resolve() != (folder / name).resolve():
                shutil.copyfile(file, folder / name)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Returns the tokenizer called 'bytes', or that of a `tokenizer.json` or a folder with one.

    Raises:
      UserError: there is none of this name, or it cannot be read.
    """
    if str(spec) == ByteTokenizer.name:
        return ByteTokenizer()
    return HFTokenizer(spec)


class StreamDecoder:
    """Turns ids into text as they come, never showing half a character.

    Bytes that begin a UTF-8 character are held back until it is complete; bytes that cannot belong
    to one become U+FFFD.

    >>> decoder = StreamDecoder(ByteTokenizer())
    >>> [decoder.push(byte) for byte in "aé".encode()]
    ['a', '', 'é']
    """

    # A tokenizer whose decoding is not concatenative shows an unfinished character as U+FFFD. A
    # character has at most four bytes, so after four tokens the mark is really one.
    _PATIENCE = 4

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._waiting: list[int] = []
        self._shown: list[int] = []  # the tokens before these: their text is out, their context not

    def push(self, index: int) -> str:
        """Takes one id and returns the text that is now complete, often ''."""
        if self._tokenizer.concatenative:
            return self._decoder.decode(self._tokenizer.decode([index]))
        self._waiting.append(index)
        text = self._new_text()
        if text.endswith("\ufffd") and len(self._waiting) < self._PATIENCE:
            return ""
        if text:
            self._shown, self._waiting = self._waiting, []
        return text

    def flush(self) -> str:
        """Returns what was held back, U+FFFD for an unfinished character, and starts anew."""
        text = (
            self._decoder.decode(b"", final=True)
            if self._tokenizer.concatenative
            else self._new_text()
        )
        self._decoder.reset()
        self._shown, self._waiting = [], []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._shown).decode()
        return self._tokenizer.decode(self._shown + self._waiting).decode()[len(before) :]


def _tokenizer_file(path: str | Path) -> Path:
    file = Path(path).expanduser()
    if os.path.isdir(file):
        file = file / TOKENIZER_FILE
    if not os.path.isfile(file):
        hint = nearest(str(path), [ByteTokenizer.name])
        raise UserError(
            f"There is no tokenizer {str(path)!r}.{hint}"
            " Give 'bytes', a tokenizer.json or a folder that holds one."
        )
    return file


def _configured(folder: Path, kind: str) -> str | None:
    """A special token in a folder's `tokenizer_config.json`, such as the `bos_token`: a string, or
    in its `content`.
    """
    try:
        config = read_json(folder / _CONFIG_FILE)
    except UserError:
        return None
    token = config.get(kind) if isinstance(config, dict) else None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
