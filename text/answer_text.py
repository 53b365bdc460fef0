"""AnswerText: the text of an answer as it comes, and the steps that a parser takes in it.

A step is a generator that yields where it has to wait for more text. It looks at the text from a place on, and takes
what is certain from its beginning. A long text is looked at piece by piece, so that taking from it copies no long rest.
"""

import re
from collections.abc import Callable, Generator
from typing import TypeVar

from text.detokenizer import overlap
from text.lenient_json import BLANKS

MOST_AT_ONCE = 4096  # characters
_NO_BLANK = re.compile(rf"[^{BLANKS}]")

T = TypeVar("T")
Steps = Generator[None, None, T]  # yields to wait for text


class NoCall(Exception):
    """What looked like a call is none."""


class End(Exception):
    """There is no more text."""


class AnswerText:
    def __init__(self) -> None:
        self._text = ""  # not taken yet
        self._waiting: list[str] = []  # pieces of what follows it, the last one first
        self._num_seen = 0  # characters, up to the end of the text
        self._is_ended = False
        self._is_whole = False  # the model itself ended the answer
        self._is_held = False  # what is taken can be put back
        self._taken: list[str] = []  # since then

    def _wait(self, text: str) -> None:
        """This follows the text, before all that is waiting; it is there at once if it is short and nothing waits."""
        length = len(text)
        if length <= MOST_AT_ONCE and not self._waiting:
            self._text += text
            self._num_seen += length
            return
        starts = range(0, length, MOST_AT_ONCE)
        self._waiting += [text[start : start + MOST_AT_ONCE] for start in reversed(starts)]

    def _place(self, at: int) -> int:
        """Of a character of the text, in the whole answer."""
        return self._num_seen - len(self._text) + at

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        if self._is_held:
            self._taken.append(taken)
        return taken

    def _put_back(self, text: str) -> None:
        """The end of what was taken; it waits again."""
        length, text, self._text = len(text), text + self._text, ""
        self._num_seen -= len(text)
        self._wait(text)
        if self._is_held:
            taken = "".join(self._taken)
            self._taken = [taken[: len(taken) - length]]

    def _more(self) -> Steps[None]:
        if not self._waiting:
            if self._is_ended:
                raise End
            yield
        if self._waiting:
            piece = self._waiting.pop()
            self._text += piece
            self._num_seen += len(piece)

    def _until(self, marks: tuple[str, ...], add: Callable[[str], None]) -> Steps[str]:
        """Adds the text before the first of the marks as it comes, and skips that; which one it was."""
        while not (found := [(at, mark) for mark in marks if (at := self._text.find(mark)) >= 0]):
            held = 0 if self._is_ended and not self._waiting else max(overlap(self._text, mark) for mark in marks)
            add(self._take(len(self._text) - held))
            yield from self._more()
        at, mark = min(found)
        add(self._take(at))
        self._take(len(mark))
        return mark

    def _find(self, mark: str, at: int) -> Steps[int]:
        while (found := self._text.find(mark, at)) < 0:
            at = max(at, len(self._text) - len(mark) + 1)
            yield from self._more()
        return found

    def _after_blanks(self, at: int) -> Steps[int]:
        """Where the next character is that is no blank; there is one."""
        while not (found := _NO_BLANK.search(self._text, at)):
            at = len(self._text)
            yield from self._more()
        return found.start()

    def _starts_with(self, mark: str, at: int) -> Steps[bool]:
        while len(self._text) < at + len(mark) and mark.startswith(self._text[at:]):
            yield from self._more()
        return self._text.startswith(mark, at)

    def _optional(self, mark: str) -> Steps[bool]:
        """Skips the mark, and blanks before it, if it comes."""
        if not mark:
            return False
        at = yield from self._after_blanks(0)
        comes = yield from self._starts_with(mark, at)
        self._take(at + len(mark) if comes else 0)
        return comes
