"""Log-probabilities as the wire shows them: tokens by their text and bytes. It knows the tokenizer, not the model."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from schemas import ChoiceLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Scored = tuple[int, float]  # token id, log-probability
UNLIKELY = -9999.0  # what OpenAI shows instead of anything lower, minus infinity above all


class TokenTexts:
    """Single tokens of one tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._is_byte_level = "\u2581" not in tokenizer.get_vocab()  # SentencePiece's space, in no byte-level alphabet
        added = tokenizer.get_added_vocab().values() if self._is_byte_level else ()
        self._verbatim = {*tokenizer.all_special_ids, *added}  # not written in the vocabulary's own alphabet

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds to a text, exactly; also where it is a part of a character."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):
            return b""  # an id that the model has and the tokenizer has not
        if token_id in self._verbatim:
            return token.encode()
        if self._is_byte_level:
            return b"".join(_BYTES.get(character, character.encode()) for character in token)
        if found := re.fullmatch("<0x([0-9A-F]{2})>", token):
            return bytes([int(found[1], 16)])
        return token.replace("\u2581", " ").encode()

    def text_of(self, token_id: int) -> str:
        """As OpenAI shows a token that is no whole character: `bytes:\\xe4\\xbd`."""
        data = self.bytes_of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def chat(self, tokens: Sequence[tuple[Scored, Sequence[Scored]]]) -> ChoiceLogprobs:
        """(the chosen token, the best ones) for each token of a chunk."""
        return ChoiceLogprobs(
            content=[
                TokenLogprob(**self._top(chosen).model_dump(), top_logprobs=[self._top(other) for other in best])
                for chosen, best in tokens
            ]
        )

    def _top(self, scored: Scored) -> TopLogprob:
        token_id, logprob = scored
        data = list(self.bytes_of(token_id))
        return TopLogprob(token=self.text_of(token_id), logprob=max(logprob, UNLIKELY), bytes=data)

    def completion(self, tokens: Sequence[tuple[Scored, Sequence[Scored]]], offset: int) -> CompletionLogprobs:
        """The legacy shape; `offset` is the number of characters before. The chosen token is among the top ones."""
        result = CompletionLogprobs()
        for chosen, best in tokens:
            text = self.text_of(chosen[0])
            result.tokens.append(text)
            result.token_logprobs.append(max(chosen[1], UNLIKELY))
            top = [*best, chosen] if best else []
            result.top_logprobs.append({self.text_of(token_id): max(value, UNLIKELY) for token_id, value in top})
            result.text_offset.append(offset)
            offset += len(text)
        return result


def _byte_alphabet() -> dict[str, bytes]:
    """The characters by which byte-level BPE writes bytes: printable ones as themselves, the others from U+0100 on.

    Source: the GPT-2 encoder (Radford et al. 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): bytes([byte]) for byte in printable} | {
        chr(0x100 + number): bytes([byte]) for number, byte in enumerate(others)
    }


_BYTES = _byte_alphabet()
