"""Chat completions: the plan of a request, what its answer must look like, and the chunks that its deltas become."""

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal
from uuid import uuid4

from prompt_templates import PromptTemplate
from schemas import (
    ChatCompletionRequest,
    ChoiceLogprobs,
    ChunkChoice,
    CustomDelta,
    Delta,
    FunctionDelta,
    ToolCallDelta,
)
from serving.admission import check_num_answers, check_request
from serving.chat_renderer import ChatRenderer, is_background_task
from serving.constraints import constraint_of
from serving.generation import GenerationRequest, OutputDelta, generate
from serving.loading import LoadedModel
from serving.sampling import sampling_params
from text.answer_parser import CallDelta, ContentDelta, ParserOptions
from text.custom_tools import TextArgument
from text.logprobs import TokenTexts
from text.structured_output import is_structured
from text.tools import ToolSet, tool_set_of

if TYPE_CHECKING:
    from engine.constraint import Constraint
    from engine.sampling_params import ReasoningTokens

State = Literal["open", "closed", "unsaid"]
LOGPROBS_ALONE = ContentDelta()
BACKGROUND = 1  # the priority of tasks that no one waits for, such as chat titles


@dataclass(frozen=True)
class ChatPlan:
    """Everything about a chat that is known before the engine is asked."""

    request: GenerationRequest
    num_choices: int
    shows_logprobs: bool
    has_content: bool  # False: calls are forced, so that the answer consists of them
    custom_tools: frozenset[str] = frozenset()  # whose calls are text

    @property
    def prompt_lengths(self) -> list[int]:
        return [len(self.request.prompt_ids)]

    @property
    def answers_per_prompt(self) -> int:
        return self.num_choices

    @property
    def computed_per_prompt(self) -> int:
        return self.num_choices

    def sources(self, loaded: LoadedModel) -> list[AsyncGenerator[OutputDelta]]:
        return [generate(loaded, index, self.request.of_choice(index)) for index in range(self.num_choices)]

    def reader(self, texts: TokenTexts) -> Callable[[OutputDelta, bool], Iterator[ChunkChoice]]:
        chunks = [ChoiceChunks(index, self, texts) for index in range(self.num_choices)]
        return lambda delta, is_first: chunks[delta.index].of(delta, is_first)


async def plan_chat(request: ChatCompletionRequest, loaded: LoadedModel, renderer: ChatRenderer) -> ChatPlan:
    """Checks the request, renders its prompt and compiles what its answer must look like. Raises APIError."""
    num_choices, template = request.n or 1, loaded.template
    check_num_answers(loaded.engine, num_choices, "n")
    tools = tool_set_of(request)
    prompt = await renderer.render(loaded, request, tools)
    prompt_ids = prompt.prompt_ids
    check_request(loaded.engine, request, prompt_ids, "messages")
    reasoning = ReasoningState(template.thinking(prompt_ids), request.thinking_token_budget)
    constraint = reasoning.before(await constraint_of(loaded, request, tools), loaded)
    params = sampling_params(loaded, request, len(prompt_ids), grammar=constraint, reasoning=reasoning.tokens(template))
    generation = GenerationRequest(
        prompt_ids=prompt_ids,
        params=params,
        stop=with_marks(request.stop_strings, template.marks),
        priority=BACKGROUND if is_background_task(request) else 0,
        images=prompt.images,
        boundaries=prompt.boundaries,
        parser_options=parser_options_of(template, tools, reasoning.state, is_structured(request), constraint),
    )
    return ChatPlan(
        request=generation,
        num_choices=num_choices,
        shows_logprobs=request.num_logprobs is not None,
        has_content=tools is None or not tools.is_required,
        custom_tools=tools.custom if tools else frozenset(),
    )


def parser_options_of(
    template: PromptTemplate, tools: ToolSet | None, state: State, is_structured: bool, constraint: "Constraint | None"
) -> ParserOptions:
    """Says how the parser reads an answer.

    state: of the reasoning, at the prompt's end; is_structured: the answer may be JSON that is not a call; constraint:
    what the answer must look like.
    """
    marks = template.marks
    options = ParserOptions(
        think=None if template.think is None else template.think.marked(marks),
        is_thinking=state == "open",
        marks={character: mark for mark, character in marks.items()},
    )
    if tools is None:
        return options
    return replace(
        options,
        tools=tools.schemas,
        format=template.tool_format.marked(marks),
        is_parallel=tools.is_parallel,
        is_forced=tools.is_required,
        is_strict=tools.is_strict,
        is_guarded=_guards_marks(constraint, template),
        is_structured=is_structured,
    )


def _guards_marks(constraint: "Constraint | None", template: PromptTemplate) -> bool:
    """Returns whether a grammar keeps calls valid: it starts at the token that begins a call."""
    from engine.sample.thinking import Thinking

    answer = constraint.answer if isinstance(constraint, Thinking) else constraint
    return answer is not None and template.tool_format.begin in template.literals


def with_marks(stops: list[str], marks: Mapping[str, str]) -> list[str]:
    """Returns the stop strings, and those that name a mark also with the character that stands for it in the text."""
    marked = []
    for stop in stops:
        for mark, character in marks.items():
            stop = stop.replace(mark, character)
        marked.append(stop)
    return list(dict.fromkeys([*stops, *marked]))


@dataclass(frozen=True)
class ReasoningState:
    """Whether an answer begins with reasoning, and how long that may be."""

    state: State  # at the prompt's end
    budget: int | None  # tokens

    def tokens(self, template: PromptTemplate) -> "ReasoningTokens | None":
        """Returns the tokens around the reasoning; None if the answer has none."""
        from engine.sampling_params import ReasoningTokens

        if self.state == "closed" or template.think is None:
            return None
        begin, end = (template.token_id(mark) for mark in template.think.marks)
        assert begin is not None and end is not None
        return ReasoningTokens(begin=begin, end=end, is_open=self.state == "open")

    def before(self, answer: "Constraint | None", loaded: LoadedModel) -> "Constraint | None":
        """Returns the constraint of the whole output: reasoning within its budget, then the answer."""
        from engine.sample.grammar import TriggeredGrammar
        from engine.sample.thinking import Thinking

        template = loaded.template
        tokens = self.tokens(template)
        think = template.think
        if think is None or tokens is None or (answer is None and self.budget is None):
            return answer
        before_end, behind, label = map(template.encode, (think.before_end, think.behind, think.label))
        num_label = 0 if tokens.is_open else len(label)  # tokens that are no thought
        thinking = Thinking(
            begin=tokens.begin,
            end=tokens.end,
            closing=(*before_end, tokens.end, *behind),
            is_open=tokens.is_open,
            num_tokens=loaded.engine.num_embeddings,
            budget=None if self.budget is None else self.budget + num_label,
            answer=answer,
        )
        if answer is None or isinstance(answer, TriggeredGrammar):
            return thinking
        stops = frozenset(loaded.engine.scheduler.eos_token_ids)
        return replace(thinking, after=tuple(behind), forbidden=stops)


class ChoiceChunks:
    """Turns the deltas of one choice into the choices of chunks."""

    def __init__(self, index: int, plan: ChatPlan, texts: TokenTexts) -> None:
        self._index, self._shows_logprobs, self._texts = index, plan.shows_logprobs, texts
        self._custom_tools = plan.custom_tools
        self._inputs: dict[int, TextArgument] = {}  # number of a call of a custom tool -> its text
        self._empty = Delta(content="" if plan.has_content else None)
        self._first = self._empty.model_copy(update={"role": "assistant"})

    def of(self, delta: OutputDelta, is_first: bool) -> Iterator[ChunkChoice]:
        """Yields the role once, then what is new; the finish reason comes last, with an empty delta."""
        if is_first:
            none_yet = ChoiceLogprobs(content=[]) if self._shows_logprobs else None
            yield ChunkChoice(index=self._index, delta=self._first, logprobs=none_yet)
        logprobs = self._texts.chat(delta.tokens) if self._shows_logprobs and delta.tokens else None
        parts = delta.parts or ((LOGPROBS_ALONE,) if logprobs else ())
        for number, part in enumerate(parts):
            shown = self._empty if part is LOGPROBS_ALONE else self._delta(part)
            yield ChunkChoice(index=self._index, delta=shown, logprobs=logprobs if number == 0 else None)
        if delta.finish_reason:
            end = {"finish_reason": delta.finish_reason, "stop_reason": delta.stopped_by}
            yield ChunkChoice(index=self._index, delta=Delta(), **end)

    def _delta(self, part: ContentDelta) -> Delta:
        if part.call is not None:
            return Delta(tool_calls=[self._call_delta(part.call)])
        if part.reasoning:
            return Delta(reasoning_content=part.reasoning)
        return Delta(content=part.content)

    def _call_delta(self, call: CallDelta) -> ToolCallDelta:
        if call.name in self._custom_tools:
            self._inputs[call.index] = TextArgument()
        delta = ToolCallDelta(index=call.index)
        if (text := self._inputs.get(call.index)) is not None:
            delta.custom = CustomDelta(name=call.name, input=text.add(call.arguments))
        else:
            delta.function = FunctionDelta(name=call.name, arguments=call.arguments)
        if call.name is not None:
            delta.id, delta.type = f"call_{uuid4().hex[:24]}", "custom" if delta.custom else "function"
        return delta
