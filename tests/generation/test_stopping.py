import itertools

import pytest

from jaxrec.errors import UserError
from jaxrec.generation import StopStrings

STOPS = [
    ["a"],
    ["ab"],
    ["aa"],
    ["aab"],
    ["aba", "bb"],
    ["abab", "ba"],  # one inside another
    ["b", "ab", "aab"],  # several end together
    ["bbbbb"],
    [],
]


def chunkings(text):
    """Every way to cut a text into pieces."""
    for cuts in itertools.product([False, True], repeat=max(len(text) - 1, 0)):
        pieces = [text[:1]]
        for character, cut in zip(text[1:], cuts, strict=True):
            if cut:
                pieces.append(character)
            else:
                pieces[-1] += character
        yield pieces


def before_stop(text, strings):
    """The text before the first string to become complete, and whether there is one."""
    for end in range(1, len(text) + 1):
        complete = [string for string in strings if text[:end].endswith(string)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@pytest.mark.parametrize("strings", STOPS, ids=repr)
def test_any_text_in_any_pieces_is_cut_at_the_first_stop(strings):
    texts = ("".join(letters) for n in range(7) for letters in itertools.product("ab", repeat=n))
    for text in texts:
        expected = before_stop(text, strings)
        for pieces in chunkings(text):
            stop, shown, stopped = StopStrings(strings), "", False
            for piece in pieces:
                safe, stopped = stop.push(piece)
                shown += safe
                assert expected[0].startswith(shown)  # nothing is shown that must be taken back
            assert (shown + stop.flush(), stopped) == expected


def test_only_what_may_begin_a_stop_is_held_back():
    stop = StopStrings(["END", "\n\n"])
    assert stop.push("an E") == ("an ", False)
    assert stop.push("gg\n") == ("Egg", False)
    assert stop.push("x") == ("\nx", False)


def test_after_the_stop_nothing_is_shown():
    stop = StopStrings(["."])
    assert stop.push("one. two") == ("one", True)
    assert stop.push("three") == ("", True)
    assert stop.flush() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match=r"A stop string is empty\. Give at least one character"):
        StopStrings(["a", ""])
