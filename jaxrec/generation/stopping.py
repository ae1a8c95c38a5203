"""Strings at which a text ends, found while the text is still coming."""

from collections.abc import Sequence

from jaxrec.errors import UserError


class StopStrings:
    """Cuts a text before the first of these strings to become complete; if several do, the longest.

    Text that may turn out to be the beginning of one is held back until that is known. How the text
    is cut into pieces makes no difference.

    >>> stop = StopStrings(["END"])
    >>> [stop.push(piece) for piece in ("an E", "N", "DLESS")]
    [('an ', False), ('', False), ('', True)]

    Raises:
      UserError: a string is empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)
        if "" in self.strings:
            raise UserError("A stop string is empty. Give at least one character, or leave it out.")
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Takes the next piece; returns what may be shown, and whether the text has ended."""
        if self._stopped:
            return "", True
        text = self._held + text
        found = [(text.find(string), string) for string in self.strings]
        ends = [(start + len(string), start) for start, string in found if start >= 0]
        if ends:
            self._stopped, self._held = True, ""
            return text[: min(ends)[1]], True
        safe = len(text) - max((_overlap(text, string) for string in self.strings), default=0)
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """Returns what was held back, as nothing more will come, and starts anew."""
        held, self._held, self._stopped = self._held, "", False
        return held


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that `string`, longer than it, begins with."""
    lengths = range(min(len(text), len(string) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(string[:length])), 0)
