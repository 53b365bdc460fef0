"""Detokenizer: token ids -> text as early as it is certain, and text up to a stop string.

TextDecoder and StopFinder work as transformers' `TextIteratorStreamer` does: `put` for each piece, then `end()`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what a tokenizer gives for bytes that are no whole character
MAX_BYTES = 64  # length of a run of single-byte tokens that is held back, in case a byte belongs to no character


class Detokenizer(Protocol):
    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> str | list[str]: ...


class MarkingDetokenizer:
    """Shows some tokens, which may be special, each as one character that no text has."""

    def __init__(self, detokenizer: Detokenizer, marks: Mapping[int, str]) -> None:
        self._detokenizer, self._marks = detokenizer, marks
        self._never = str.maketrans(dict.fromkeys(marks.values(), REPLACEMENT))

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        text, start = "", 0
        for place, token_id in enumerate(token_ids):
            if token_id in self._marks:
                text += self._text(token_ids[start:place]) + self._marks[token_id]
                start = place + 1
        return text + self._text(token_ids[start:])

    def _text(self, token_ids: list[int]) -> str:
        text = str(self._detokenizer.decode(token_ids, skip_special_tokens=True)) if token_ids else ""
        return text if text.isascii() else text.translate(self._never)


class TextDecoder:
    """Turns token ids into text as early as it is certain; in the end that is what the tokenizer decodes from all ids.

    The bytes of an incomplete character are held back; bytes that never become one are U+FFFD. With a token for each
    byte beside the others (SentencePiece's byte fallback) a run of such tokens is text if all of it is valid, and else
    one U+FFFD for each byte, so that it is certain where it ends, or is longer than MAX_BYTES.
    `prefix` is text before the answer that decides how its first token reads.
    """

    def __init__(self, tokenizer: Detokenizer, prefix: Sequence[int] = (), byte_ids: Collection[int] = ()) -> None:
        """byte_ids: the tokens whose runs are read as a whole."""
        self._tokenizer, self._byte_ids = tokenizer, byte_ids
        self._ids = list(prefix)  # a window: tokens whose text is out, and those after them
        self._num_known = len(self._ids)
        self._text = self._decode(self._ids)
        self._num_out = len(self._without_incomplete(self._text))  # characters of the window's text
        self._prefix_end = self._text[self._num_out :]  # what the prefix ends in, unless the answer completes it
        self._is_in_run = False

    def put(self, token_id: int) -> str:
        """Returns the text that this token makes certain."""
        before, text = self._text, self._decode([*self._ids, token_id])
        if before and text == before and not self._decode([token_id]):  # a token that is never shown
            return ""
        self._ids.append(token_id)
        self._text = text
        self._is_in_run = token_id in self._byte_ids or (self._is_in_run and text == before)
        if self._is_in_run and len(self._ids) - self._num_known < MAX_BYTES:
            return ""
        certain = text if self._byte_ids else text.removesuffix(REPLACEMENT)
        new = certain[self._num_out :]
        self._num_out = len(certain)
        self._move_window(before)
        return self._without_prefix_end(new) if self._prefix_end else new

    def end(self) -> str:
        """Returns what was held back: no character will be completed any more."""
        return self._without_prefix_end(self._text[self._num_out :])

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _without_incomplete(self, text: str) -> str:
        return text.rstrip(REPLACEMENT) if self._byte_ids else text.removesuffix(REPLACEMENT)

    def _without_prefix_end(self, new: str) -> str:
        if new:
            new, self._prefix_end = new.removeprefix(self._prefix_end), ""
        return new

    def _move_window(self, before: str) -> None:
        """Moves the window's beginning to where no character is cut. before: the text without the last token."""
        if self._num_out == len(self._text):
            recent = self._ids[self._num_known :]
            if text := self._decode(recent):  # else the next token would be read as a text's first
                self._ids, self._text, self._num_out = recent, text, len(text)
            self._num_known = len(self._ids)
        elif self._text == before + (last := self._decode(self._ids[-1:])):  # the last token completes nothing
            self._ids, self._num_known, self._text = self._ids[-1:], 0, last
            self._num_out -= len(before)


class StopFinder:
    """Passes text on up to the first stop string. A suffix that may become one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped_by: str | None = None  # the stop string that came

    def put(self, text: str, may_stop: bool = True) -> str:
        """Returns the text that is certain. Without may_stop, a stop string that is completed here is text."""
        if not self._stops or self.is_stopped:
            return "" if self.is_stopped else text
        num_before = len(self._held)
        self._held += text
        begins = [(stop, self._held.find(stop, max(num_before + 1 - len(stop), 0))) for stop in self._stops]
        ends = [(at + len(stop), at) for stop, at in begins if at >= 0]
        if ends and may_stop:  # the one that was complete first, so that it does not matter how the text was split
            at = min(ends)[1]
            self.stopped_by = next(stop for stop, begin in begins if (begin + len(stop), begin) == min(ends))
            text, self._held = self._held[:at], ""
            return text
        cut = len(self._held) - max(overlap(self._held, stop) for stop in self._stops)
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    @property
    def is_stopped(self) -> bool:
        return self.stopped_by is not None

    @property
    def is_holding(self) -> bool:
        """Whether a stop string may have begun."""
        return bool(self._held)

    def end(self) -> str:
        """Returns what was held back: it has not become a stop string."""
        return self._held


def overlap(text: str, stop: str) -> int:
    """Returns the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def detokenizer_of(tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Returns what decodes single tokens: the tokenizer's core where `decode` adds nothing, in a fifth of the time."""
    from transformers import PreTrainedTokenizerFast

    adds_nothing = all(
        getattr(type(tokenizer), name, None) is getattr(PreTrainedTokenizerFast, name) for name in ("decode", "_decode")
    )
    is_plain = adds_nothing and not tokenizer.clean_up_tokenization_spaces
    return tokenizer.backend_tokenizer if is_plain else tokenizer
