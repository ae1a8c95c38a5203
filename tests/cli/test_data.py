"""`jaxrec data`: what it writes and what it says."""

from pathlib import Path

import tyro

from jaxrec.cli import data as command
from jaxrec.training.data import load_data


def test_the_command_writes_a_folder_and_says_what_is_in_it(tmp_path, capsys):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"text number {i}")
    out = tmp_path / "new" / "tokens"
    source = str(tmp_path / "*.txt")
    command.run(command.Arguments(source=source, out=out, valid_fraction=0.2))
    data = load_data(out)
    printed = capsys.readouterr().out
    assert f"train: {len(data.train.starts)} documents, {data.train.num_bytes} bytes" in printed
    assert data.provenance["sha256"] in printed
    assert str(out) in printed
    assert [path.name for path in out.parent.iterdir()] == ["tokens"]  # nothing half written


def test_source_and_folder_are_positions():
    arguments = tyro.cli(command.Arguments, args=["python-docs", "out", "--valid-fraction", "0.1"])
    assert arguments == command.Arguments(source="python-docs", out=Path("out"), valid_fraction=0.1)
