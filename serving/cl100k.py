"""Cl100k: the token ids that OpenAI's clients send in place of texts, as texts. It encodes nothing.

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
        """Raises KeyError for an id that is no token of text. A character that is cut in two becomes U+FFFD."""
        return b"".join(self._tokens[token_id] for token_id in token_ids).decode(errors="replace")
