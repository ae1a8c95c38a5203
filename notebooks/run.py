"""Executes the notebooks (NN_*.py, jupytext percent format) into build/notebooks with their output.

`python notebooks/run.py` runs all, `python notebooks/run.py 01_time` those named.
"""

import sys
import time
from pathlib import Path

import jupytext
import nbclient
import nbformat

HERE = Path(__file__).parent
BUILD = HERE.parent / "build" / "notebooks"


def execute(source: Path) -> Path:
    """Runs one notebook in a fresh kernel of this Python and returns where it was written."""
    notebook = jupytext.read(source)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    target = BUILD / f"{source.stem}.ipynb"
    BUILD.mkdir(parents=True, exist_ok=True)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        resources={"metadata": {"path": HERE}},
        extra_arguments=["--log-level=ERROR"],  # no advice on encryption of local sockets
    )
    try:
        client.execute()
    finally:
        nbformat.write(notebook, target)  # with its output up to the failing cell, if there is one
    return target


def main(names: list[str]) -> None:
    known = {source.stem: source for source in sorted(HERE.glob("[0-9][0-9]_*.py"))}
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"No notebook {', '.join(unknown)}; there are: {', '.join(known)}.")
    for name in names or known:
        start = time.perf_counter()
        target = execute(known[name])
        print(f"{target.relative_to(HERE.parent)}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
