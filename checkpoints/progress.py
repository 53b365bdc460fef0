"""Progress: what the server does until its model is ready. `/health` shows it, and a terminal as a bar."""

import sys
from typing import TextIO

WIDTH = 32  # characters of the bar


class Progress:
    """The current phase and the fraction done, also written to `stream`: as a bar if it is a terminal, else as a line
    per tenth. stream: None for standard error."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.phase = "starting"
        self.fraction = 0.0
        self._stream = stream or sys.stderr
        self._shown: tuple[str, int] = ("", -1)  # phase, percent

    def __str__(self) -> str:
        return f"{self.phase}: {round(100 * self.fraction)} %"

    def report(self, phase: str, fraction: float) -> None:
        """Sets the phase and the fraction done, from 0 to 1; may be called from any thread."""
        self.phase, self.fraction = phase, min(1.0, max(0.0, fraction))
        is_terminal = self._stream.isatty()
        percent = int(self.fraction * 100) if is_terminal else int(self.fraction * 10) * 10
        if (phase, percent) == self._shown:
            return
        if is_terminal:
            begin = "\r" if phase == self._shown[0] else "\n" if self._shown[0] else ""
            bar = "█" * round(self.fraction * WIDTH)
            self._stream.write(f"{begin}{phase:<40} |{bar:<{WIDTH}}| {percent:3d} %" + "\n" * (percent == 100))
            self._shown = ("" if percent == 100 else phase, percent)
        else:
            self._stream.write(f"{phase}: {percent} %\n")
            self._shown = (phase, percent)
        self._stream.flush()
