"""The command `jaxrec`: finds the subcommand, reads its arguments, and turns bad input into one
line.
"""

import contextlib
import errno
import importlib
import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrec.errors import UserError, nearest

COMMANDS = {
    "train": "train a language model or a solver of puzzles, or go on with a run",
    "generate": "continue prompts with a trained model",
    "eval": "validation loss and bits per byte, by depth; puzzles solved, by segment",
    "data": "tokenise a corpus once into files that runs map into memory",
    "convert": "read a published checkpoint into a run, or write one",
    "bench": "time scans, models and training steps, beside other programs",
    "launch": "write what starts a run on several hosts: SLURM, GKE or ssh",
    "plan": "what a training run would need and send, without allocating it",
    "profile": "trace a step, a forward pass or decoding, and list what takes the time",
    "check": "compare every op with float64 on the devices of this machine",
    "list": "what the library holds: models, sizes, conversions",
}
VIRTUAL = re.compile(r"--xla_force_host_platform_device_count=(\d+)")
MODULES = {"eval": "evaluate", "list": "list_systems"}
EXIT_BAD_INPUT = 2
ABOUT_FILES = (  # not ours to prevent: no room, no right, or a file where a folder should be
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status, 2 for bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if devices := VIRTUAL.search(os.environ.get("XLA_FLAGS", "")):
        # With no more threads than devices, two collectives of one program may wait for each other.
        os.environ.setdefault("PJRT_NPROC", str(min(8 * int(devices[1]), 256)))
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_overview())
            return 0
        name, *rest = argv
        if name not in COMMANDS:
            raise UserError(
                f"There is no command {name!r}.{nearest(name, COMMANDS)}"
                f" Commands: {', '.join(COMMANDS)}."
            )
        command = importlib.import_module(f"jaxrec.cli.{MODULES.get(name, name)}")
        parse = getattr(command, "parse", None)
        arguments = (
            parse(rest) if parse else read_arguments(command.Arguments, rest, f"jaxrec {name}")
        )
        return command.run(arguments) or 0
    except UserError as error:
        print(f"jaxrec: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("jaxrec: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has left; there is nobody to tell
        return 141
    except OSError as error:
        if error.errno not in ABOUT_FILES:
            raise
        where = f" {error.filename}" if error.filename else ""
        print(
            f"jaxrec: cannot use{where}: {error.strerror}. What was saved before is intact;"
            " make room or choose another place, and repeat the command.",
            file=sys.stderr,
        )
        return EXIT_BAD_INPUT


def read_arguments(kind: Any, argv: Sequence[str], program: str, default: Any = None) -> Any:
    """Reads command-line arguments into a dataclass.

    Args:
      kind: the dataclass.
      argv: the arguments after the command.
      program: how the command is called, for its help.
      default: values of options that are not given; the dataclass's own if None.

    Raises:
      UserError: an option is unknown (names the nearest), missing or malformed.
    """
    import tyro

    options = {} if default is None else {"default": default}
    shown, complaint = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=list(argv), prog=program, **options)
    except SystemExit as end:
        print(shown.getvalue(), end="")
        if not end.code:
            raise
        raise UserError(_one_line(complaint.getvalue() or shown.getvalue(), program)) from None
    except ValueError as error:  # a dataclass refused its own values
        raise UserError(str(error)) from error


def program() -> str:
    """How `jaxrec` was called, for commands that are printed to be typed: its name where the shell
    finds it, else the path of the script, else through Python.
    """
    script = Path(sys.argv[0])
    if shutil.which("jaxrec"):
        return "jaxrec"
    if script.name == "jaxrec":
        return shlex.quote(os.path.relpath(script))
    return f"{shlex.quote(sys.executable)} -m jaxrec"


def _one_line(complaint: str, program: str) -> str:
    """Tyro's framed message without the frame."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", complaint)
    text = re.sub(r"[─━│╭╮╰╯┌┐└┘]+|-{4,}", " ", text)
    text = re.sub(r"For full helptext.*", "", text, flags=re.DOTALL)
    text = re.sub(r"\s+", " ", text).strip().removeprefix("Parsing error ")
    text = text.removeprefix("Unrecognized options ").strip()
    return f"{text.rstrip('.')}. `{program} --help` lists all options."


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  jaxrec {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: jaxrec COMMAND ...", "", *lines, "", "`jaxrec COMMAND --help` says more."]
    )


if __name__ == "__main__":
    sys.exit(main())
