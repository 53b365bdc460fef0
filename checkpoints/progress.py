"""Progress: what the server does until its model is ready. `/health` reads it; a terminal shows it as a bar."""

import sys
from typing import TextIO

WIDTH = 32  # characters of the bar


class Progress:
    """`report(phase, fraction)` from any thread. Where standard error is no terminal, a line per tenth."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.phase = "starting"
        self.fraction = 0.0
        self._stream = stream or sys.stderr
        self._last: tuple[str, int] = ("", -1)  # what was shown: phase, percent

    def report(self, phase: str, fraction: float) -> None:
        self.phase, self.fraction = phase, min(1.0, max(0.0, fraction))
        is_terminal = self._stream.isatty()
        percent = int(self.fraction * 100) if is_terminal else int(self.fraction * 10) * 10
        if (phase, percent) == self._last:
            return
        if is_terminal:
            begin = "\r" if phase == self._last[0] else "\n" if self._last[0] else ""
            bar = "█" * round(self.fraction * WIDTH)
            self._stream.write(f"{begin}{phase:<40} |{bar:<{WIDTH}}| {percent:3d} %" + "\n" * (percent == 100))
            self._last = ("" if percent == 100 else phase, percent)
        else:
            self._stream.write(f"{phase}: {percent} %\n")
            self._last = (phase, percent)
        self._stream.flush()
