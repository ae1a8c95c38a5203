"""The terminal shows a bar when someone is watching and plain lines otherwise."""

import io

from jaxrec.training.progress import RunProgress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_in_a_pipe():
    now = [100.0]
    stream = io.StringIO()
    with RunProgress(300, start=100, stream=stream, clock=lambda: now[0]) as progress:
        progress.update(100)
        now[0] += 20
        progress.update(110, loss=1.23456, bits_per_byte=1.781, tokens_per_second=12345.6)
        progress.note("saved [step 110]")
        now[0] += 10_000
        progress.update(200, tokens_per_second=12.3)
    assert stream.getvalue().splitlines() == [
        "step 100/300",
        "step 110/300  loss 1.235  1.781 bits/byte  12.3k tokens/s  6:20 left",
        "saved [step 110]",
        "step 200/300  12 tokens/s  2:47:00 left",
    ]


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with RunProgress(10, stream=stream) as progress:
        progress.update(5, loss=2.0)
        progress.note("a note")
        progress.update(10, loss=1.0)
    text = stream.getvalue()
    assert "step 10/10  loss 1.000" in text
    assert "a note" in text
    assert "\x1b[" in text
