"""Chat completions: what an answer must look like, how it is read, and the chunks that its pieces become."""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal
from uuid import uuid4

from errors import InvalidRequest, unsupported
from prompt_templates import PromptTemplate
from schemas import ChoiceLogprobs, ChunkChoice, Delta, FunctionDelta, ToolCallDelta
from serving.generation import OutputDelta
from serving.loading import LoadedModel
from text.answer_parser import CallDelta, ContentDelta, ParserOptions
from text.logprobs import TokenTexts
from text.structured_output import Structure
from text.tools import ToolSet

if TYPE_CHECKING:
    from engine.constraint import Constraint
    from engine.sample.grammar import GrammarCompiler
    from engine.sampling_params import ThoughtTokens

State = Literal["open", "closed", "unsaid"]
NOTHING = ContentDelta()  # log-probabilities alone


def reading_of(
    template: PromptTemplate, box: ToolSet | None, state: State, is_structured: bool, constraint: "Constraint | None"
) -> ParserOptions:
    """state: of the thinking, at the prompt's end; is_structured: the answer may be JSON of another kind; constraint:
    what the answer must look like."""
    marks = template.marks
    think = None if template.think is None else (marks[template.think[0]], marks[template.think[1]])
    reading = ParserOptions(
        think=think, is_thinking=state == "open", marks={character: mark for mark, character in marks.items()}
    )
    if box is None:
        return reading
    return replace(
        reading,
        tools=box.schemas,
        format=template.tool_format.marked(marks),
        is_parallel=box.is_parallel,
        is_forced=box.is_required,
        is_strict=box.is_strict,
        is_guarded=_guards_marks(constraint, template),
        is_structured=is_structured,
    )


def _guards_marks(constraint: "Constraint | None", template: PromptTemplate) -> bool:
    """Whether a grammar holds behind the mark of a call, which only a token can set off."""
    from engine.sample.thinking import Thinking

    answer = constraint.answer if isinstance(constraint, Thinking) else constraint
    return answer is not None and template.tool_format.begin in template.literals


def with_marks(stops: list[str], marks: Mapping[str, str]) -> list[str]:
    """Stop strings also as text looks in which marks are characters of their own."""
    others = []
    for stop in stops:
        for mark, character in marks.items():
            stop = stop.replace(mark, character)
        others.append(stop)
    return list(dict.fromkeys([*stops, *others]))


async def compiled(loaded: LoadedModel, structure: Structure, is_parallel: bool) -> "Constraint | None":
    """Raises InvalidRequest, which names the field."""
    from engine.sample.grammar import TriggeredGrammar

    if loaded.grammars is None:
        if structure.is_needed:
            raise unsupported(next(iter(structure.fields)))
        return None
    trigger = None if structure.trigger is None else loaded.template.token_id(structure.trigger)
    try:
        grammar = await asyncio.to_thread(loaded.grammars.compile, structure.text)
    except ValueError as error:
        if not structure.is_needed:
            return None
        field = await asyncio.to_thread(_wrong_field, loaded.grammars, structure)
        raise InvalidRequest(f"{field}: {error}", param=field, code="invalid_value") from error
    return grammar if trigger is None else TriggeredGrammar(grammar, trigger, is_parallel)


def _wrong_field(grammars: "GrammarCompiler", structure: Structure) -> str:
    """The first field whose part of the grammar is wrong by itself."""
    for field, text in structure.fields.items():
        try:
            grammars.compile(text)
        except ValueError:
            return field
    return next(iter(structure.fields))


@dataclass(frozen=True)
class ReasoningState:
    """Of a chat's answer."""

    state: State  # at the prompt's end
    budget: int | None  # tokens

    def tokens(self, template: PromptTemplate) -> "ThoughtTokens | None":
        """Those around them; None if there are none."""
        from engine.sampling_params import ThoughtTokens

        if self.state == "closed" or template.think is None:
            return None
        begin, end = (template.token_id(mark) for mark in template.think)
        assert begin is not None and end is not None
        return ThoughtTokens(begin, end, self.state == "open")

    def before(self, answer: "Constraint | None", loaded: LoadedModel) -> "Constraint | None":
        """What an answer must look like holds from the end of the thoughts on."""
        from engine.sample.grammar import TriggeredGrammar
        from engine.sample.thinking import Thinking

        template = loaded.template
        tokens = self.tokens(template)
        if tokens is None or (answer is None and self.budget is None):
            return answer
        thinking = Thinking(
            tokens.begin,
            tokens.end,
            (*template.encode("\n"), tokens.end, *template.encode("\n\n")),
            tokens.is_open,
            loaded.engine.num_embeddings,
            self.budget,
            answer,
        )
        if answer is None or isinstance(answer, TriggeredGrammar):
            return thinking
        stops = frozenset(loaded.engine.scheduler.eos_token_ids)
        return replace(thinking, after=tuple(template.encode("\n\n")), forbidden=stops)


class ChoiceChunks:
    """One choice's pieces as parts of chunks."""

    def __init__(self, index: int, shows_logprobs: bool, texts: TokenTexts, is_call: bool) -> None:
        """is_call: the answer has no content, since calls are forced."""
        self._index, self._shows_logprobs, self._texts = index, shows_logprobs, texts
        self._nothing = Delta(content=None if is_call else "")
        self._first = self._nothing.model_copy(update={"role": "assistant"})

    def of(self, piece: OutputDelta, is_first: bool) -> Iterator[ChunkChoice]:
        """The role once, what was said, and the finish reason with an empty delta."""
        if is_first:
            none_yet = ChoiceLogprobs(content=[]) if self._shows_logprobs else None
            yield ChunkChoice(index=self._index, delta=self._first, logprobs=none_yet)
        logprobs = self._texts.chat(piece.tokens) if self._shows_logprobs and piece.tokens else None
        parts = piece.parts or ((NOTHING,) if logprobs else ())
        for number, part in enumerate(parts):
            own = logprobs if number == 0 else None
            delta = self._nothing if part is NOTHING else _delta(part)
            yield ChunkChoice(index=self._index, delta=delta, logprobs=own)
        if piece.finish_reason:
            yield ChunkChoice(index=self._index, delta=Delta(), finish_reason=piece.finish_reason)


def _delta(part: ContentDelta) -> Delta:
    if part.call is not None:
        return Delta(tool_calls=[_call_delta(part.call)])
    if part.reasoning:
        return Delta(reasoning_content=part.reasoning)
    return Delta(content=part.content)


def _call_delta(call: CallDelta) -> ToolCallDelta:
    function = FunctionDelta(name=call.name, arguments=call.arguments)
    if call.name is None:
        return ToolCallDelta(index=call.index, function=function)
    return ToolCallDelta(index=call.index, id=f"call_{uuid4().hex[:24]}", type="function", function=function)
