"""`jaxrec data SOURCE OUT`: tokenises a corpus once, into files that later runs map into memory."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Tokenise a corpus into a folder that `jaxrec train --data FOLDER` maps into memory."""

    source: tyro.conf.Positional[str]
    """python-docs, a text file, a folder of text files, or a glob in quotes."""
    out: tyro.conf.Positional[Path]
    """New folder to write."""
    tokenizer: str = "bytes"
    """bytes, a tokenizer.json, or a folder that holds one."""
    valid_fraction: float = 0.05
    """Share of the documents kept for validation, above 0 and at most 0.5."""


def run(arguments: Arguments) -> None:
    """Writes the folder and prints what is in it.

    Raises:
      UserError: the source, the tokenizer or the folder cannot be used.
    """
    from jaxrec.training.data import write_data

    data = write_data(
        arguments.source, arguments.out, arguments.tokenizer, arguments.valid_fraction
    )
    for side, stream in (("train", data.train), ("valid", data.valid)):
        print(
            f"{side}: {len(stream.starts):,} documents, {stream.num_bytes:,} bytes, "
            f"{len(stream.tokens):,} tokens"
        )
    print(f"tokenizer {data.tokenizer.name}, {data.train.vocab_size:,} ids")
    print(f"corpus sha256 {data.provenance['sha256']}")
    print(f"written to {arguments.out}; use it with --data {arguments.out}")
