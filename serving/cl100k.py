"""Cl100k: decodes the token ids that OpenAI's clients may send in place of texts.

Source of the file's format: https://github.com/openai/tiktoken, load.py. A line per token: its bytes in base64, its id.
"""

import base64
from collections.abc import Sequence
from pathlib import Path


class Cl100k:
    def __init__(self, tokens: dict[int, bytes]) -> None:
        self._tokens = tokens

    @classmethod
    def read(cls, path: Path) -> "Cl100k":
        lines = (line.split() for line in path.read_bytes().splitlines() if line)
        return cls({int(number): base64.b64decode(token) for token, number in lines})

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of token ids; half a character becomes U+FFFD. Raises KeyError for other ids."""
        return b"".join(self._tokens[token_id] for token_id in token_ids).decode(errors="replace")
