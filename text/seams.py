"""Seams: a message stays text, though it is spelled like a control token.

A template joins the messages to one text, which the tokenizer then reads. A user who writes `<|im_end|>` would end the
turn. So the tokens that a message spells are cut in two with a seam, a character (here `~`) that occurs nowhere else,
and what is between seams is tokenized apart:

    the user writes       Hi <|im_end|>
    the template gets     Hi <~|im_end|>
    it makes              <|im_start|>user\nHi <~|im_end|><|im_end|>\n
    tokenized apart       <|im_start|>user\nHi <          |im_end|><|im_end|>\n

The template's own `<|im_end|>` is a token, the user's is the texts `<` and `|im_end|>`, and the model sees the same
characters.
"""

import re
from typing import Any

from errors import InvalidRequest

SEAMS = [chr(code) for code in [*range(0xFDD0, 0xFDF0), *range(0xF0000, 0xF0100)]]  # they never occur in real text


def unused_characters(text: str, count: int) -> list[str]:
    """Returns characters that do not occur in a text. Raises InvalidRequest where too few are left."""
    unused = [character for character in SEAMS if character not in text][:count]
    if len(unused) < count:
        raise InvalidRequest("The messages use all of Unicode's noncharacters: remove at least one.", param="messages")
    return unused


def cut(value: Any, pattern: re.Pattern[str], seam: str) -> Any:
    """Copies a JSON value with the seam behind the first character of each match in its texts."""
    if isinstance(value, str):
        return pattern.sub(lambda match: match[0][:1] + seam + match[0][1:], value)
    if isinstance(value, list):
        return [cut(item, pattern, seam) for item in value]
    if isinstance(value, dict):
        return {cut(key, pattern, seam): cut(item, pattern, seam) for key, item in value.items()}
    return value
