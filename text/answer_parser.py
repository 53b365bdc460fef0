"""AnswerParser: turns an answer's text, as it comes, into reasoning, content and calls of tools.

One parser reads streams and whole answers, so how the text is cut makes no difference.

There is one rule for calls that are not written as the model was taught (docs/tool-calls.md has it with examples): what
can be read in one way alone is repaired, and what cannot stays content, all of it. Arguments that reach a client are
JSON, and fit the tool's schema where they could be read so. A call is therefore given when it has been read whole,
unless a grammar keeps it valid: then its arguments are given as they come. A call without the mark that the format
begins it with must fit its schema, since it may be an example in a text. An answer that ends in the middle of a call
gives the beginning of that call.

An example, with the format MARKED, a tool `f` and no grammar:

    put('Look: <tool')              content 'Look:'    held back: a blank, and what may be the mark <tool_call>
    put('_call>{"name": "f", ')     nothing            the mark is there: the format reads on, and nothing is given
    put('"arguments": {"x": 1}}')   call f, {"x": 1}   it is whole, and fits the schema of f; the blank is dropped
    put('</tool_call> Done.')       content ' Done.'   the mark behind the call is skipped

With `{x: 1}` in the third text, which is no JSON, the format raises NoCall. That undoes the call: its text is put back,
and is content with the blank before it: ' <tool_call>{"name": "f", "arguments": {x: 1}}'.

How the code runs: a step is a generator, and the steps that are under way form a stack, `_answer` at its bottom.
`put` adds text and continues the stack where it waits. It waits in one place, `AnswerText.more`, by `yield`; with
`yield from` a step runs another and gets its result. A step looks at the text without taking it while it may still be
something else, and takes what is certain.

    NoCall   What looked like a call is none. AnswerParts takes back what was held, and `_lines` makes content of it.
    End      There is no more text. Each step gives what it has, as a beginning, and passes the exception on.
"""

from contextlib import suppress
from dataclasses import dataclass

from schemas import FinishReason
from text.answer_parts import AnswerParts, CallDelta, CallOptions, ContentDelta
from text.answer_text import End, NoCall, Steps
from text.argument_schemas import fits
from text.argument_values import fitted, value_of
from text.lenient_json import BLANKS
from text.reasoning_format import ReasoningFormat
from text.tool_calls.python_calls import python_calls
from text.tool_calls.tool_format import ToolFormat

__all__ = ["AnswerParser", "CallDelta", "ContentDelta", "ParserOptions"]

FENCE = "```"
FENCED = ("json", "tool_code", "tool_call", "tool_calls", "python", "")  # languages of fences that may hold calls


@dataclass(frozen=True)
class ParserOptions(CallOptions):
    """How an answer is to be read."""

    format: ToolFormat | None = None  # None: there are no calls
    think: ReasoningFormat | None = None
    is_thinking: bool = False  # the prompt ends inside of the reasoning


class AnswerParser(AnswerParts):
    def __init__(self, options: ParserOptions) -> None:
        super().__init__(options, None if options.format is None else options.format.begin)
        self.is_reasoning = options.is_thinking
        self._format = options.format
        self._think = options.think
        self._steps = self._answer()

    def put(self, text: str) -> list[ContentDelta]:
        """Reads the next text of the answer and returns what has become certain."""
        self._wait(text)
        return self._run()

    def end(self, is_whole: bool = False) -> list[ContentDelta]:
        """Returns the rest. is_whole: the model itself ended the answer, so that what it left open is closed."""
        self._is_ended, self.is_whole = True, is_whole
        return self._run()

    def finish_reason(self, reason: FinishReason) -> FinishReason:
        """Returns `tool_calls` if there are calls, all of them complete, and the model ended by itself."""
        has_calls = 0 < self._num_calls == self.num_complete
        return "tool_calls" if reason == "stop" and has_calls else reason

    def _run(self) -> list[ContentDelta]:
        next(self._steps, None)
        parts, self._parts = self._parts, []
        return parts

    # --- the steps

    def _answer(self) -> Steps[None]:
        try:
            if self._think is not None:
                yield from self._thinking(self._think)
            yield from self._after_thinking()
        except End:
            if self._blanks and not self._num_calls and not self.is_reasoning:
                self._add(ContentDelta(content=self._blanks))

    def _after_thinking(self) -> Steps[None]:
        style = self._format
        if style is None:
            yield from self._plain()
        elif style.is_whole_answer:
            yield from self._whole_answer(style)
        else:
            yield from self._lines(style)

    def _thinking(self, think: ReasoningFormat) -> Steps[None]:
        has_begun = self.is_reasoning
        if not has_begun:
            try:
                at = yield from self.after_blanks(0)
                if not (yield from self.starts_with(think.begin, at)):
                    return
            except End:
                self._add_content(self.take(len(self.text)))
                raise
            self.take(at + len(think.begin))
        self.is_reasoning = self._is_at_start = True
        if think.label and not has_begun:
            yield from self._label(think)
        yield from self._thoughts(think.end)
        self.is_reasoning, self._blanks, self._is_at_start = False, "", not self._has_content

    def _label(self, think: ReasoningFormat) -> Steps[None]:
        """Takes what stands for the kind of reasoning; an answer that ends in it has none."""
        label = think.label.rstrip()
        if (yield from self.starts_with(label, 0)):
            at = yield from self.after_blanks(len(label))
            if "\n" in self.text[:at] or (yield from self.starts_with(think.end, at)):
                self.take(at)

    def _thoughts(self, end: str) -> Steps[None]:
        """Takes the reasoning up to its end mark.

        Where the answer ends before that mark, the first call in the reasoning ends it, if the call's mark begins a
        line or is a token that stands for nothing else. Such a call is held until the answer or the reasoning ends.
        """
        style = self._format
        if style is None or not style.begin or self.options.is_strict:
            yield from self.until((end,), self._add_reasoning)
            return
        line = _Line()
        marks: tuple[str, ...] = (end, style.begin)
        while True:
            mark = yield from self.until(marks, lambda text: self._add_reasoning(line.add(text)))
            if mark == end:
                return
            is_token = mark in self.options.marks
            if not (is_token or line.is_blank) or not (yield from self._begins_call(style)):
                self._add_reasoning(line.add(mark))
                continue
            if end in marks and (yield from self._is_draft(mark, end)):
                return
            self.text, marks = mark + self.text, (style.begin,)
            if (yield from self._call_in_thoughts(style)):
                return
            line.add(mark)

    def _is_draft(self, mark: str, end: str) -> Steps[bool]:
        """Returns whether the reasoning ends behind this mark: then what is between is reasoning; else nothing is
        taken."""
        held: list[str] = []
        try:
            yield from self.until((end,), held.append)
        except End:
            self.put_back("".join(held))
            return False
        self._add_reasoning(mark + "".join(held))
        return True

    def _begins_call(self, style: ToolFormat) -> Steps[bool]:
        """Returns whether what follows a mark may be a call."""
        with suppress(End):
            at = yield from self.after_blanks(0)
            return self.text[at] == FENCE[0] or (yield from style.begins_call(self, at))
        return False

    def _call_in_thoughts(self, style: ToolFormat) -> Steps[bool]:
        """Reads a call at the beginning of the text, behind which the answer ends; what is no call is reasoning."""
        num_before, self._is_unguarded = self._num_calls, True
        blanks, self._blanks = self._blanks, ""
        try:
            yield from self._marked_call(style, len(style.begin))
        except NoCall:
            self._blanks, self._is_unguarded = blanks, False
            self._add_reasoning(self.take(max(self._num_barren, len(style.begin))))
            self._num_barren = 0
            return False
        except End:
            if self._num_calls == num_before:
                self._blanks = blanks
                self._add_reasoning(self.take(len(self.text)))
            else:
                self.is_reasoning = False
            raise
        return True

    def _plain(self) -> Steps[None]:
        while True:
            self._add_content(self.take(len(self.text)))
            yield from self.more()

    def _whole_answer(self, style: ToolFormat) -> Steps[None]:
        """Reads an answer that is one call, or else content."""
        try:
            yield from style.read_calls(self, (yield from self.after_blanks(0)), is_marked=False)
            if self.is_done:
                return
        except NoCall:
            pass
        except End:
            if not self._num_calls:
                self._add_content(self.take(len(self.text)))
            raise
        yield from self._plain()

    def _lines(self, style: ToolFormat) -> Steps[None]:
        """Reads calls behind marks, and without: models forget the mark at the beginning of a line or in a fence."""
        while not self.is_done:
            num_before = self._num_calls
            try:
                at = yield from self.after_blanks(0)
                if style.begin and (yield from self.starts_with(style.begin, at)):
                    yield from self._marked_call(style, at + len(style.begin))
                elif self._has_marks_alone(style):
                    raise NoCall
                elif self._num_calls and self.text[at] == ";":
                    self.take(at + 1)
                elif (yield from self.starts_with(FENCE, at)):
                    yield from self._fenced(style, at)
                elif not style.begin and (yield from self._begins_python(at)):
                    yield from self._python_line(at)
                else:
                    yield from style.read_calls(self, at, is_marked=False)
                    yield from self.skip(style.end or ";")
            except NoCall:
                if self.options.is_structured and not style.begin:
                    yield from self._plain()
                yield from self._line(style.begin)
            except End:
                if self._num_calls == num_before:
                    self._add_content(self.take(len(self.text)))
                raise

    def _has_marks_alone(self, style: ToolFormat) -> bool:
        """Returns whether nothing here is a call unless it has the mark."""
        is_inside_line = self.options.is_strict and self._ends_with_call
        return is_inside_line or (self.options.is_structured and bool(style.begin))

    def _line(self, begin: str) -> Steps[None]:
        """Takes the rest of a line as content, up to the mark of a call; a mark that begins the line was of no call."""
        if self._num_barren:
            self._add_content(self.take(self._num_barren))
            self._num_barren = 0
        elif begin and self.text.lstrip(BLANKS).startswith(begin):
            self._add_content(self.take(self.text.index(begin) + len(begin)))
        mark = yield from self.until(("\n", begin) if begin else ("\n",), self._add_content)
        self._ends_with_call = False
        if mark == "\n":
            self._add_content(mark)
        else:
            self.text = mark + self.text

    def _marked_call(self, style: ToolFormat, at: int) -> Steps[None]:
        """Reads one call, or several behind the same mark, which may be in a fence."""
        at = yield from self.after_blanks(at)
        is_fenced = yield from self.starts_with(FENCE, at)
        if is_fenced:
            at = yield from self.after_blanks((yield from self.find("\n", at)))
        yield from style.read_calls(self, at, is_marked=True)
        with suppress(NoCall):
            while not self.is_done and (yield from self._begins_another(style)):
                yield from style.read_calls(self, (yield from self.after_blanks(0)), is_marked=True)
        if is_fenced:
            yield from self.skip(FENCE)
        yield from self.skip(style.end)

    def _begins_another(self, style: ToolFormat) -> Steps[bool]:
        return (yield from style.begins_another(self, (yield from self.after_blanks(0))))

    def _fenced(self, style: ToolFormat, at: int) -> Steps[None]:
        """Reads a block of code: calls, or content."""
        start = yield from self.find("\n", at)
        language = self.text[at + len(FENCE) : start].strip()
        inside = yield from self.after_blanks(start)
        if style.begin and (yield from self.starts_with(style.begin, inside)):
            with suppress(NoCall):
                yield from self._marked_call(style, inside + len(style.begin))
                yield from self.skip(FENCE)
                return
        if language in FENCED and self.text[inside] in "{[":
            with suppress(NoCall):
                yield from style.read_calls(self, inside, is_marked=False)
                yield from self.skip(FENCE)
                return
        if language in FENCED and not self.options.is_strict:
            end = yield from self.find(FENCE, inside)
            if calls := self._python_calls(self.text[inside:end], must_fit=bool(style.begin)):
                self.take(end + len(FENCE))
                self._add_calls(calls)
                return
        self._num_barren = 0
        self._add_content(self.take(start))
        yield from self.until((FENCE,), self._add_content)
        self._add_content(FENCE)
        yield from self._line("")

    def _add_calls(self, calls: list[tuple[str, str]]) -> None:
        for name, arguments in calls[: None if self.options.is_parallel else 1]:
            self.begin_call(name)
            self.add_arguments(arguments)
            self.end_call()

    def _begins_python(self, at: int) -> Steps[bool]:
        """Returns whether a list of calls in Python begins here: `[weather(`."""
        if self.options.is_strict or self.text[at] != "[":
            return False
        heads = [f"[{name}(" for name in self.options.tools]
        while not any(self.text.startswith(head, at) for head in heads):
            if not any(head.startswith(self.text[at:]) for head in heads):
                return False
            yield from self.more()
        return True

    def _python_line(self, at: int) -> Steps[None]:
        """Reads a list of calls in Python that is alone on its line. They must fit: the form is not the one taught."""
        end = at
        with suppress(End):
            end = yield from self.find("\n", at)
        end = end if end > at else len(self.text)
        calls = self._python_calls(self.text[at:end], must_fit=True)
        if not calls:
            raise NoCall
        self.take(end)
        self._add_calls(calls)

    def _python_calls(self, code: str, must_fit: bool) -> list[tuple[str, str]]:
        """Returns the names and arguments of calls in Python; none if the code is anything else."""
        tools = self.options.tools
        calls = [(name, fitted(own, tools[name])) for name, own in python_calls(code, tools) or ()]
        fit = all(fits(value_of(own), tools[name], tools[name]) for name, own in calls)
        return calls if fit or not must_fit else []


class _Line:
    """Whether the text so far ends in a line that is blank."""

    def __init__(self) -> None:
        self.is_blank = True

    def add(self, text: str) -> str:
        """Returns the same text."""
        _, line_break, last = text.rpartition("\n")
        self.is_blank = not last.strip(BLANKS) and (bool(line_break) or self.is_blank)
        return text
