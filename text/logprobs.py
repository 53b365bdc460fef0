"""Log-probabilities as the wire shows them: tokens by their text and bytes. It knows the tokenizer, not the model."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from schemas import ChoiceLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


UNLIKELY = -9999.0  # OpenAI shows nothing lower, and this for minus infinity


class Scored(Protocol):
    """A token with its log-probability, as the engine gives it."""

    @property
    def token_id(self) -> int: ...

    @property
    def logprob(self) -> float | None: ...

    @property
    def top_logprobs(self) -> Sequence[tuple[int, float]]: ...


class TokenTexts:
    """Shows single tokens of one tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._is_byte_level = "\u2581" not in tokenizer.get_vocab()  # SentencePiece's space, in no byte-level alphabet
        added = tokenizer.get_added_vocab().values() if self._is_byte_level else ()
        self._verbatim = {*tokenizer.all_special_ids, *added}  # not written in the vocabulary's own alphabet
        ids = {} if self._is_byte_level else tokenizer.get_vocab()
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        self.byte_ids = frozenset(ids[name] for name in names if name in ids)  # of SentencePiece's byte fallback

    def bytes_of(self, token_id: int) -> bytes:
        """Returns the exact bytes that a token adds to a text, also where it is a part of a character."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):
            return b""  # the model has more ids than the tokenizer
        if token_id in self._verbatim:
            return token.encode()
        if self._is_byte_level:
            return b"".join(_BYTES.get(character, character.encode()) for character in token)
        if found := re.fullmatch("<0x([0-9A-F]{2})>", token):
            return bytes([int(found[1], 16)])
        return token.replace("\u2581", " ").encode()

    def text_of(self, token_id: int) -> str:
        """Returns a token's text; a part of a character as OpenAI shows it: `bytes:\\xe4\\xbd`."""
        data = self.bytes_of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def chat(self, tokens: Sequence[Scored]) -> ChoiceLogprobs:
        """Returns the log-probabilities of a chunk's tokens, all of which are scored."""
        return ChoiceLogprobs(
            content=[
                TokenLogprob(
                    **self._top(token.token_id, token.logprob or 0.0).model_dump(),
                    top_logprobs=[self._top(*other) for other in token.top_logprobs],
                )
                for token in tokens
            ]
        )

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        data = list(self.bytes_of(token_id))
        return TopLogprob(token=self.text_of(token_id), logprob=max(logprob, UNLIKELY), bytes=data)

    def completion(self, tokens: Sequence[Scored], offsets: Sequence[int]) -> CompletionLogprobs:
        """Returns the legacy shape; `offsets` are in characters.

        The chosen token is among the top ones; a token without a log-probability is a prompt's first.
        """
        result = CompletionLogprobs(text_offset=list(offsets))
        for token in tokens:
            text, logprob = self.text_of(token.token_id), token.logprob
            top = {self.text_of(other): max(value, UNLIKELY) for other, value in token.top_logprobs}
            if top and logprob is not None:
                top.setdefault(text, max(logprob, UNLIKELY))
            result.tokens.append(text)
            result.token_logprobs.append(None if logprob is None else max(logprob, UNLIKELY))
            result.top_logprobs.append(None if logprob is None else top)
        return result


def _byte_alphabet() -> dict[str, bytes]:
    """Returns the characters of byte-level BPE: printable bytes as themselves, the others from U+0100 on.

    Source: the GPT-2 encoder (Radford et al. 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): bytes([byte]) for byte in printable} | {
        chr(0x100 + number): bytes([byte]) for number, byte in enumerate(others)
    }


_BYTES = _byte_alphabet()
