"""Batch: the tokens of the sequences that one step computes."""

from dataclasses import dataclass

from engine.sequence import Sequence


@dataclass(frozen=True)
class Span:
    """Tokens start .. start + num_tokens of a sequence, computed in one step; the last ones may be a guess."""

    sequence: Sequence
    start: int
    num_tokens: int
    draft: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_decode(self) -> bool:
        """One token of an answer, and what may follow it. One of a prompt is computed as the others of it are, so
        that its logits do not depend on how the prompt was cut."""
        return self.num_tokens - len(self.draft) == 1 and self.start >= len(self.sequence.prompt_ids)

    @property
    def is_complete(self) -> bool:
        """It has the sequence's last token: the step yields the next one, or more of them."""
        return self.end - len(self.draft) == self.sequence.num_tokens

    def lesser(self) -> "Span":
        """Fewer of its tokens, if that is possible: without the guess, else half of them."""
        if self.draft:
            return Span(self.sequence, self.start, self.num_tokens - len(self.draft))
        if self.num_tokens > 1 and not self.sequence.whole_images_in(self.start, self.end):
            return Span(self.sequence, self.start, self.num_tokens // 2)
        return self

    def token_at(self, position: int) -> int:
        """0 where it is not known yet."""
        known = self.sequence.token_ids
        if position < len(known):
            return known[position]
        return self.draft[position - len(known)] if self.draft else 0


@dataclass(frozen=True)
class Batch:
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
