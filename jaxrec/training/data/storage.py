"""Token streams as files: tokenised once, mapped into memory by every later run.

A data folder holds, for each side of the split (train and valid), `<side>.bin`, the little-endian
token ids, and `<side>.starts.npy`, the positions at which documents begin; `meta.json` says what
they are, with a CRC-32 of each, and a copy of the `tokenizer.json` lies beside them where one was
used. A folder is made under another name and renamed when it is complete, so it is there whole or
not at all.
"""

import json
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from jaxrec.config import read_json
from jaxrec.errors import UserError
from jaxrec.training.data.arrays import read_array
from jaxrec.training.data.streams import TokenStream, token_dtype
from jaxrec.training.data.tokenizers import TOKENIZER_FILE, Tokenizer, load_tokenizer

META = "meta.json"
FORMAT = "jaxrec-tokens"
VERSION = 2
SIDES = ("train", "valid")
FILES = tuple(f"{side}{end}" for side in SIDES for end in (".bin", ".starts.npy"))
CHECKED = 2**32
"""Bytes of a file that are read to check it, at some GB a second; of larger ones the size is."""
_AGAIN = "Make the folder again with: jaxrec data"


def is_data_folder(folder: Path) -> bool:
    """Says whether a folder is one of these, perhaps a damaged one, and not one of text files."""
    if any(
        os.path.exists(folder / f"{side}{end}") for side in SIDES for end in (".bin", ".starts.npy")
    ):
        return True
    try:
        return FORMAT in (folder / META).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def check_new_folder(out: Path) -> None:
    """Raises UserError unless a data folder can be made there: nothing, or an empty folder."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file. Give the name of a new folder.")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(
            f"{out} exists and is not empty. Give the name of a new folder, or remove it first."
        )


def write_streams(
    out: Path, streams: dict[str, TokenStream], tokenizer: Tokenizer, provenance: dict[str, Any]
) -> None:
    """Writes the folder `out`, whole or not at all.

    Args:
      out: a folder that does not exist or is empty.
      streams: the streams 'train' and 'valid'.
      tokenizer: what made the tokens.
      provenance: where the text is from, kept as it is in `meta.json`.

    Raises:
      UserError: `out` holds something already, or cannot be written.
    """
    check_new_folder(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror}. Give another folder.") from error
    try:
        _write_files(unfinished, streams, tokenizer, provenance)
        unfinished.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        os.replace(unfinished, out)
    except OSError as error:
        raise UserError(
            f"{out} could not be written: {error.strerror}. Nothing was left there."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone already when all went well


def read_streams(folder: Path) -> tuple[dict[str, TokenStream], Tokenizer, dict[str, Any]]:
    """Maps a data folder into memory.

    Returns:
      The streams 'train' and 'valid', their tokenizer and their provenance.

    Raises:
      UserError: a file is missing, cut short, or not what `meta.json` says; names the file.
    """
    meta = _read_meta(folder)
    with_file = meta["tokenizer"] != "bytes"
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE if with_file else "bytes")
    if tokenizer.vocab_size != meta["vocab_size"]:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, {META} says "
            f"{meta['vocab_size']}. {_AGAIN}"
        )
    return {side: _read_side(folder, side, meta) for side in SIDES}, tokenizer, meta["provenance"]


def _write_files(
    folder: Path, streams: dict[str, TokenStream], tokenizer: Tokenizer, provenance: dict[str, Any]
) -> None:
    dtype = token_dtype(tokenizer.vocab_size)
    for side in SIDES:
        with open(folder / f"{side}.bin", "wb") as file:
            file.write(np.ascontiguousarray(streams[side].tokens, dtype.newbyteorder("<")).data)
        np.save(folder / f"{side}.starts.npy", streams[side].starts, allow_pickle=False)
    tokenizer.save(folder)
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "tokens": {side: len(streams[side].tokens) for side in SIDES},
        "documents": {side: len(streams[side].starts) for side in SIDES},
        "bytes": {side: streams[side].num_bytes for side in SIDES},
        "crc32": {name: _crc32(folder / name) for name in FILES},
        "provenance": provenance,
    }
    (folder / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META
    try:
        meta = read_json(path)
    except UserError as error:
        raise UserError(f"{error} {_AGAIN}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(f"{path} does not describe a data folder of jaxrec. {_AGAIN}")
    if meta.get("version") != VERSION:
        raise UserError(
            f"{path} has version {meta.get('version')!r}, this jaxrec reads version {VERSION}. "
            f"{_AGAIN}"
        )
    kinds = {"tokenizer": str, "vocab_size": int, "dtype": str, "crc32": dict, "provenance": dict}
    counts = ("tokens", "documents", "bytes")
    for name, kind in (kinds | dict.fromkeys(counts, dict)).items():
        if not isinstance(meta.get(name), kind):
            raise UserError(f"{path}: expected {name} to be of type {kind.__name__}. {_AGAIN}")
    for name in counts:
        if not all(isinstance(meta[name].get(side), int) for side in SIDES):
            raise UserError(
                f"{path}: expected a number for train and for valid in {name}. {_AGAIN}"
            )
    return meta


def _read_side(folder: Path, side: str, meta: dict[str, Any]) -> TokenStream:
    tokens_path, starts_path = folder / f"{side}.bin", folder / f"{side}.starts.npy"
    dtype = token_dtype(meta["vocab_size"]).newbyteorder("<")
    count, documents = meta["tokens"][side], meta["documents"][side]
    for path in (tokens_path, starts_path):
        if not path.is_file():
            raise UserError(f"{path} is missing. {_AGAIN}")
    size, expected = tokens_path.stat().st_size, count * dtype.itemsize
    if meta["dtype"] != dtype.name or size != expected:
        raise UserError(
            f"{tokens_path} has {size} bytes; {META} says {count} tokens of {meta['dtype']}, "
            f"{expected} bytes. It was cut short or is another file. {_AGAIN}"
        )
    try:
        starts = read_array(starts_path)
    except UserError as error:
        raise UserError(f"{starts_path} was cut short or is not an array file. {_AGAIN}") from error
    if starts.dtype != np.int64 or starts.shape != (documents,):
        raise UserError(
            f"{starts_path} does not hold the {documents} positions {META} speaks of. {_AGAIN}"
        )
    if documents > 0 and (starts[0] != 0 or starts[-1] >= count or not np.all(np.diff(starts) > 0)):
        raise UserError(
            f"{starts_path} does not hold increasing positions from 0 to {count}. {_AGAIN}"
        )
    for path in (tokens_path, starts_path):
        _check_sum(path, meta)
    # an empty file cannot be mapped
    tokens = np.memmap(tokens_path, dtype, "r") if count > 0 else np.zeros(0, dtype)
    return TokenStream(tokens, starts, meta["bytes"][side], meta["vocab_size"])


def _check_sum(path: Path, meta: dict[str, Any]) -> None:
    if path.stat().st_size <= CHECKED and _crc32(path) != meta["crc32"].get(path.name):
        raise UserError(f"{path} does not hold what was written. {_AGAIN}")


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            value = zlib.crc32(block, value)
    return value


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
