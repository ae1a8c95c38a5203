"""The one exception that means: the input was wrong, not the library."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message is one line: what was wrong, what was expected, what to do.

    Every command prints it to standard error and exits with status 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ' Did you mean X?' for the known name closest to `name`, or '' when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""
