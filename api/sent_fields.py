"""Errors of a chat name the fields that the client sent, which have other names and places in its protocol."""

import re
from collections.abc import Iterable, Sequence

from errors import APIError

Names = Iterable[tuple[re.Pattern[str], str]]  # what an error of chat completions names -> the field that was sent
_MESSAGE = re.compile(r"\bmessages\[(\d+)\]")


def name_as_sent(error: APIError, names: Names, origins: Sequence[str] = ()) -> APIError:
    """Renames the fields in an error.

    origins: for each message of the chat the place of what it came from; empty where the places are the same.
    """

    def place(match: re.Match[str]) -> str:
        number = int(match[1])
        return origins[number] if number < len(origins) else match[0]

    def sent_as(text: str) -> str:
        text = _MESSAGE.sub(place, text)
        for pattern, name in names:
            text = pattern.sub(name, text)
        return text

    error.message, error.param = sent_as(error.message), error.param and sent_as(error.param)
    return error
