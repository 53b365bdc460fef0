"""Batch: the tokens of the sequences that one step computes."""

from dataclasses import dataclass

from engine.sequence import Sequence


@dataclass(frozen=True)
class Span:
    """Tokens start .. start + num_tokens of a sequence, which one step computes; the last ones may be guesses."""

    sequence: Sequence
    start: int
    num_tokens: int
    draft: tuple[int, ...] = ()  # the guessed tokens at its end

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_decode(self) -> bool:
        """Whether it is one token of an answer, with the guesses after it. A single token of a prompt is not: it is
        computed in the same way as the rest of the prompt, so that its logits do not depend on where that was cut."""
        return self.num_tokens - len(self.draft) == 1 and self.start >= len(self.sequence.prompt_ids)

    @property
    def is_complete(self) -> bool:
        """Whether it holds the sequence's last known token, so that the step yields the next one, or several."""
        return self.end - len(self.draft) == self.sequence.num_tokens

    def smaller(self) -> "Span":
        """Returns a span of fewer tokens: without the guesses, else half of them; the span itself where neither is
        possible."""
        if self.draft:
            return Span(self.sequence, self.start, self.num_tokens - len(self.draft))
        if self.num_tokens > 1 and not self.sequence.whole_images_in(self.start, self.end):
            return Span(self.sequence, self.start, self.num_tokens // 2)
        return self

    def token_at(self, position: int) -> int:
        """Returns the token id at a position of the sequence, known or guessed; 0 where it is neither."""
        token_ids = self.sequence.token_ids
        if position < len(token_ids):
            return token_ids[position]
        return self.draft[position - len(token_ids)] if self.draft else 0


@dataclass(frozen=True)
class Batch:
    """What one step computes."""

    spans: tuple[Span, ...]

    @property
    def sequences(self) -> list[Sequence]:
        return [span.sequence for span in self.spans]

    @property
    def num_tokens(self) -> int:
        return sum(span.num_tokens for span in self.spans)

    @property
    def num_decodes(self) -> int:
        return sum(span.is_decode for span in self.spans)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(span.num_tokens for span in self.spans if not span.is_decode)
