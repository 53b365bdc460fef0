"""Progress as /health and people read it."""

import io

from checkpoints.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_one_bar_that_fills() -> None:
    stream = Terminal()
    progress = Progress(stream)
    for step in range(101):
        progress.report("loading weights", step / 100)
    text = stream.getvalue()
    assert text.count("\n") == 1 and text.count("\r") > 90 and "100 %" in text


def test_a_log_sees_a_line_per_tenth() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    for step in range(101):
        progress.report("downloading", step / 100)
    assert len(stream.getvalue().splitlines()) == 11


def test_what_was_reported_last_can_be_read() -> None:
    progress = Progress(io.StringIO())
    progress.report("converting", 1.5)
    assert (progress.phase, progress.fraction) == ("converting", 1.0)
