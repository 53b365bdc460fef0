"""PromptText: a conversation as text, on its way to token ids."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

MOST_CLOSING = 16  # tokens that may close the reasoning behind a template's text


@dataclass(frozen=True)
class PromptText:
    text: str
    seam: str  # a character that cuts control tokens in two which messages spell; see text/seams.py
    opens: bool  # whether it ends with the assistant's header

    def encode(self, encode: Callable[[str], list[int]]) -> list[int]:
        """Returns its tokens. encode: gives those of a text."""
        parts = self.text.split(self.seam)
        encoded = {part: encode(part) for part in set(parts)}  # many marks make many equal parts
        return [token_id for part in parts for token_id in encoded[part]]

    def num_tokens_before(
        self,
        num_characters: int,
        prompt_ids: Sequence[int],
        control: re.Pattern[str],
        encode: Callable[[str], list[int]],
    ) -> int:
        """Returns the number of tokens before the last control token that ends within the first characters; 0 if there
        is none.

        prompt_ids: the tokens of the whole text, perhaps with some that close the reasoning. control: finds control
        tokens, before which a text can be cut without a change to its tokens.
        """
        matches = [match for match in control.finditer(self.text, 0, num_characters) if match[0]]
        if not matches:
            return 0
        rest = replace(self, text=self.text[matches[-1].start() :]).encode(encode)
        place = len(prompt_ids) - len(rest)
        places = range(place, max(0, place - MOST_CLOSING), -1)
        return next((at for at in places if prompt_ids[at] == rest[0]), 0)
