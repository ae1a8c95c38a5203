"""What Orbax says when files are damaged or cannot be written, cut down to one line."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator

_ARRAY = re.compile(r"""(?:(?:reading|at) "|'path': ')(?!/)([^"']+?)/(?:\.zarray)?["']""")
"""Where the messages of the storage library name an array."""

_SYSTEM = re.compile(r"os_error_code='(\d+)'")
"""Where they give the number of an error of the operating system."""


class Damage(Exception):
    """A checkpoint is not what was saved."""


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Keeps the terminal clean while a restore may fail.

    When one array cannot be read, Orbax closes its event loop under the reads still under way;
    those end in the hooks for exceptions that nobody can catch and print tracebacks, after the
    error that we report has been raised.
    """
    hooks = sys.excepthook, sys.unraisablehook
    sys.excepthook, sys.unraisablehook = (lambda *_: None), (lambda _: None)
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook = hooks


def reason_of(error: Exception) -> str:
    """What went wrong, on part of a line: our own words, the array in question, or Orbax's."""
    if isinstance(error, Damage):
        return str(error)
    array = _ARRAY.search(str(error))
    if array:
        return f"the array {array[1]} cannot be read"
    system = _SYSTEM.search(str(error))
    if system:
        return os.strerror(int(system[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def is_not_from_orbax(record: logging.LogRecord) -> bool:
    """Drops Orbax's log: it prints tracebacks for errors that we report ourselves in one line."""
    return "orbax" not in record.pathname
