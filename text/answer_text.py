"""AnswerText: the text of an answer as it comes, and the steps that a parser takes in it.

A step is a generator that yields where it has to wait for more text. It looks at the text from a place on, and takes
what is certain from its beginning. A long text is looked at piece by piece, so that taking from it copies no long rest.
"""

import re
from collections.abc import Callable, Generator
from typing import TypeVar

from text.detokenizer import overlap
from text.lenient_json import BLANKS

MAX_AT_ONCE = 4096  # characters
_NO_BLANK = re.compile(rf"[^{BLANKS}]")

T = TypeVar("T")
Steps = Generator[None, None, T]  # yields to wait for text


class NoCall(Exception):
    """What looked like a call is none."""


class End(Exception):
    """There is no more text."""


class AnswerText:
    def __init__(self) -> None:
        self.text = ""  # not taken yet
        self.is_whole = False  # the model itself ended the answer
        self.is_held = False  # what is taken can be put back
        self._waiting: list[str] = []  # pieces of what follows it, the last one first
        self._num_seen = 0  # characters, up to the end of the text
        self._is_ended = False
        self._taken: list[str] = []  # while it is held

    def _wait(self, text: str) -> None:
        """Adds text behind what is there, and before all that waits; a short one is there at once if none waits."""
        length = len(text)
        if length <= MAX_AT_ONCE and not self._waiting:
            self.text += text
            self._num_seen += length
            return
        starts = range(0, length, MAX_AT_ONCE)
        self._waiting += [text[start : start + MAX_AT_ONCE] for start in reversed(starts)]

    def place(self, at: int) -> int:
        """Converts a place in the text to one in the whole answer."""
        return self._num_seen - len(self.text) + at

    def take(self, length: int) -> str:
        taken, self.text = self.text[:length], self.text[length:]
        if self.is_held:
            self._taken.append(taken)
        return taken

    def put_back(self, text: str) -> None:
        """Undoes the end of what was taken; it waits again."""
        length, text, self.text = len(text), text + self.text, ""
        self._num_seen -= len(text)
        self._wait(text)
        if self.is_held:
            taken = "".join(self._taken)
            self._taken = [taken[: len(taken) - length]]

    def more(self) -> Steps[None]:
        """Waits for more text. Raises End if there is none."""
        if not self._waiting:
            if self._is_ended:
                raise End
            yield
        if self._waiting:
            piece = self._waiting.pop()
            self.text += piece
            self._num_seen += len(piece)

    def until(self, marks: tuple[str, ...], add: Callable[[str], None]) -> Steps[str]:
        """Passes the text before the first of the marks to `add` as it comes, takes the mark, and returns it."""
        while not (found := [(at, mark) for mark in marks if (at := self.text.find(mark)) >= 0]):
            held = 0 if self._is_ended and not self._waiting else max(overlap(self.text, mark) for mark in marks)
            add(self.take(len(self.text) - held))
            yield from self.more()
        at, mark = min(found)
        add(self.take(at))
        self.take(len(mark))
        return mark

    def find(self, mark: str, at: int) -> Steps[int]:
        """Waits for a mark and returns its place; nothing is taken."""
        while (found := self.text.find(mark, at)) < 0:
            at = max(at, len(self.text) - len(mark) + 1)
            yield from self.more()
        return found

    def after_blanks(self, at: int) -> Steps[int]:
        """Waits for the next character that is no blank and returns its place."""
        while not (found := _NO_BLANK.search(self.text, at)):
            at = len(self.text)
            yield from self.more()
        return found.start()

    def starts_with(self, mark: str, at: int) -> Steps[bool]:
        while len(self.text) < at + len(mark) and mark.startswith(self.text[at:]):
            yield from self.more()
        return self.text.startswith(mark, at)

    def skip(self, mark: str) -> Steps[bool]:
        """Takes the mark, and blanks before it, if it comes next."""
        if not mark:
            return False
        at = yield from self.after_blanks(0)
        comes = yield from self.starts_with(mark, at)
        self.take(at + len(mark) if comes else 0)
        return comes
