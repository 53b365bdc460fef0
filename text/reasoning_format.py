"""ReasoningFormat: the marks around a model's reasoning, and the text that belongs to them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class ReasoningFormat:
    """How models of a family write their reasoning, which comes before the answer."""

    begin: str  # a mark, which is one token of the model
    end: str  # another
    label: str = ""  # behind the mark of the beginning; it is no reasoning
    before_end: str = ""  # between the reasoning and the mark of its end
    behind: str = ""  # between that mark and the answer
    switch: str = ""  # a token of the prompt, without which the model does not reason
    off: str = ""  # what a prompt ends with, so that the model does not reason; "": only its template can tell it so

    @property
    def marks(self) -> tuple[str, str]:
        return self.begin, self.end

    @property
    def closing(self) -> str:
        """The text that ends reasoning which has begun."""
        return f"{self.before_end}{self.end}{self.behind}"

    def marked(self, marks: Mapping[str, str]) -> "ReasoningFormat":
        """Returns the same format with other text for some marks."""
        return replace(self, begin=marks.get(self.begin, self.begin), end=marks.get(self.end, self.end))


THINK = ReasoningFormat(
    begin="<think>", end="</think>", before_end="\n", behind="\n\n", off="<think>\n\n</think>\n\n"
)  # of most models that reason
CHANNEL = ReasoningFormat(begin="<|channel>", end="<channel|>", label="thought\n", switch="<|think|>")  # of Gemma 4
