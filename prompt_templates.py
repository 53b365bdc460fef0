"""OpenAI messages -> canonical messages -> token ids; one row per model family.

The tokenizer's own chat template always wins; a family's is for tokenizers that have none (GGUF files, base models).
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, Literal

from errors import InvalidRequest
from schemas import Message
from text import family_templates
from text.canonical_messages import (
    CanonicalMessage,
    alternate,
    apart,
    canonical,
    fold_tools,
    is_alternating,
    join_leading_system,
    later_system_as_user,
    num_images,
    prefix_tool_names,
    system_into_user,
)
from text.detokenizer import MarkingDetokenizer, detokenizer_of
from text.json_bounds import check_characters
from text.named_templates import chosen, source_of
from text.prompt_text import PromptText
from text.reasoning_format import CHANNEL, THINK, ReasoningFormat
from text.seams import cut, unused_characters
from text.template_probe import TemplateForm, behind_answer, hidden_by, is_usual, shows_images, try_out
from text.tool_calls.element_calls import GLM_XML, QWEN_XML
from text.tool_calls.gemma_calls import GEMMA_CALLS
from text.tool_calls.json_calls import LINES, MARKED, PARAMETERS
from text.tool_calls.lark import Literals
from text.tool_calls.named_calls import NAMED
from text.tool_calls.tool_format import ToolFormat, taught_by
from vision.family import Grid, VisionFamily

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKUP = re.compile(
    r"<\|.*\|>|<\|\w+>|<\w+\|>|</?(think|tool_call|tool_response|tools?)>|<(start|end)_of_\w+>|<\w+_soft_token>"
)
RENDERING_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
FIRST_MARK = 0x10FF00  # private-use characters stand for the tokens of marks, so that text spelled alike is told apart
NONE = "(?!)"  # a regular expression that nothing fits


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family of models is recognised and spoken to; what a model's own files say goes before all of it."""

    name: str
    model_types: str = NONE  # a regular expression of config.model_type
    names: str = NONE  # another of the model's name, where the type says nothing
    marker: str | None = None  # a token that its chat format needs
    template: str  # Jinja, for a tokenizer without one of its own
    ends: tuple[str, ...] = ()  # tokens that end an answer
    ends_begin_turns: bool = False  # they begin the next turn: in the template of another family they end nothing
    tools: ToolFormat
    context_length: int  # tokens, where the model's config has none
    quantization: str = "int8"  # the fewest bits that cost it little, see docs/models.md
    think: ReasoningFormat | None = None
    alternates: bool = False  # its templates want user and assistant in turn, and know no system role
    lead: str = "{}\n\n"  # the system's text before the user's, if they alternate


# The tokens before (the text before the gap, the text behind it, the filling); a model that has them knows the task
FILL_IN_THE_MIDDLE = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen 2.5 Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),  # DeepSeek Coder
)
END_OF_FILE = ("<|endoftext|>", "<|fim_pad|>", "<|file_sep|>", "<|file_separator|>", "<|repo_name|>")  # end a filling

_with_gemma_turns = partial(
    Family,
    marker="<start_of_turn>",
    template=family_templates.GEMMA,
    ends=("<end_of_turn>", "<turn|>"),
    tools=LINES,
    alternates=True,
)
_with_chatml = partial(
    Family, marker="<|im_start|>", template=family_templates.CHATML, ends=("<|im_end|>",), tools=MARKED
)
_with_glm_turns = partial(Family, ends=("<|user|>", "<|observation|>"), ends_begin_turns=True, context_length=8192)

# The first family that fits counts; the last two are for models that no other fits
FAMILIES = (
    _with_gemma_turns(
        name="Gemma 3",
        model_types=r"gemma3(_text)?",
        names="gemma-?3(?!n)",
        context_length=32768,
        quantization="int4",
    ),
    _with_gemma_turns(
        name="Gemma 3n", model_types=r"gemma3n(_text)?", names="gemma-?3n", context_length=32768, quantization="int4"
    ),
    Family(
        name="Gemma 4",
        model_types=r"gemma4(_\w+)?",
        names="gemma-?4",
        marker="<|turn>",
        template=family_templates.GEMMA_4,
        ends=("<turn|>", "<|tool_response>"),  # the second one waits for the results of calls
        tools=GEMMA_CALLS,
        context_length=131072,
        quantization="int4",
        think=CHANNEL,
    ),
    _with_gemma_turns(name="Gemma 2", model_types="gemma2", names="gemma-?2", context_length=8192),
    _with_gemma_turns(name="Gemma", model_types="gemma.*", names="gemma", context_length=8192),
    _with_chatml(
        name="Qwen 3.5",
        model_types=r"qwen3_5(_moe)?(_text)?",
        names=r"qwen-?3\.[5-9]",
        tools=QWEN_XML,
        context_length=32768,
        think=THINK,
    ),
    _with_chatml(
        name="Qwen 3",
        model_types=r"qwen3(_moe|_next|_vl|_vl_moe)?(_text)?",
        names=r"qwen-?3(?!\.[5-9])",
        context_length=32768,
        think=THINK,
    ),
    _with_chatml(
        name="Qwen 2.5", model_types=r"qwen2(_moe|_vl|_5_vl)?(_text)?", names="qwen(?!-?3)", context_length=32768
    ),
    Family(
        name="Llama 3",
        model_types="m?llama",
        names="llama-?3",
        marker="<|start_header_id|>",
        template=family_templates.LLAMA,
        ends=("<|eot_id|>", "<|eom_id|>"),
        tools=PARAMETERS,
        context_length=8192,
        quantization="int4",
    ),
    Family(
        name="Llama 2",
        names="llama-?2",
        template=family_templates.LLAMA_2,
        tools=LINES,
        context_length=4096,
        alternates=True,
        lead="<<SYS>>\n{}\n<</SYS>>\n\n",
    ),
    _with_glm_turns(
        name="GLM-4",
        model_types="glm.*",
        names="glm-?4",
        marker="<sop>",
        template=family_templates.GLM,
        tools=NAMED,
    ),
    _with_glm_turns(
        name="ChatGLM",
        model_types="chatglm.*",
        names="chatglm",
        marker="<|assistant|>",
        template=family_templates.CHATGLM,
        tools=LINES,
    ),
    _with_chatml(name="SmolLM", model_types="smollm.*", names="smollm", context_length=2048, think=THINK),
    _with_chatml(name="LFM2", model_types=r"lfm[23](_moe)?", names=r"lfm-?[23]", context_length=32768),
    Family(
        name="Granite",
        model_types="granite.*",
        names="granite",
        marker="<|start_of_role|>",
        template=family_templates.GRANITE,
        ends=("<|end_of_text|>",),
        tools=MARKED,
        context_length=4096,
    ),
    _with_chatml(name="ChatML", context_length=2048),
    Family(name="generic", template=family_templates.PLAIN, ends=("<|end|>",), tools=LINES, context_length=2048),
)
*KNOWN, CHATML, GENERIC = FAMILIES

# How messages of the system may be changed for a template that refuses them, the least change first
SYSTEM_CHANGES = (join_leading_system, later_system_as_user, system_into_user)
# A template that shows tools teaches the first of these formats whose signs it has
TOOL_FORMATS = (GEMMA_CALLS, QWEN_XML, GLM_XML, MARKED, NAMED, PARAMETERS)


def family_of(model_type: str, vocabulary: Collection[str], name: str = "") -> Family:
    """Returns the first family whose type fits, else whose name does; the tokenizer must have its marker."""
    able = [family for family in KNOWN if family.marker is None or family.marker in vocabulary]
    for family in able:
        if re.fullmatch(family.model_types, model_type):
            return family
    for family in able:
        if re.search(family.names, name, re.IGNORECASE):
            return family
    return CHATML if CHATML.marker in vocabulary else GENERIC


Attempt = tuple[list[CanonicalMessage], list[dict[str, Any]] | None]  # messages, and the tools for the template


@dataclass(frozen=True)
class RenderOptions:
    """What a prompt depends on beside its messages; with None, the messages or the template decide."""

    continues: bool | None = None  # the last message is continued; None: if it is the assistant's and has text
    opens: bool | None = None  # the prompt ends with the assistant's header; None: unless it continues a message
    image_grids: Sequence[Sequence[Grid]] = ()  # of the tokens of each image's crops
    tools: Sequence[dict[str, Any]] = ()  # in OpenAI's form
    thinks: bool | None = None
    effort: str | None = None  # of the thinking, for templates that know of it
    arguments: Mapping[str, Any] = field(default_factory=dict)  # further ones of the template, as clients send them


class PromptTemplate:
    """Turns messages or text into token ids for one model. A call takes milliseconds, more for long prompts."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        model_type: str,
        vision: VisionFamily | None = None,
        name: str = "",
    ) -> None:
        """vision: None for a model that does not see; name: the model's.

        The tokenizer's chat template is tried here, in milliseconds. Raises ValueError for one that cannot be chosen.
        """
        self.tokenizer = tokenizer
        self._vision = vision
        self._vocabulary = tokenizer.get_vocab()
        self._added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        self.family = family_of(model_type, self._vocabulary.keys(), name)
        template = tokenizer.chat_template
        self.is_own = bool(template)
        self._template = None if template else self.family.template
        self._source = source_of(template) or self.family.template
        self._forms = {has_tools: self._tried(has_tools) for has_tools in (False, True)}
        taught = None if "tools" in self._forms[True].hidden else taught_by(self._source, TOOL_FORMATS)
        self._shows_tools, self.tool_format = taught is not None, taught or self.family.tools
        self.think = self._reasoning_format()
        self.detokenizer = detokenizer_of(tokenizer)
        self.marks = {mark: chr(FIRST_MARK + number) for number, mark in enumerate(sorted(self._marks))}
        self.marking_detokenizer = MarkingDetokenizer(
            self.detokenizer, {self._vocabulary[mark]: character for mark, character in self.marks.items()}
        )
        added = tokenizer.added_tokens_decoder.values()
        control = [token.content for token in added if token.special]
        self._control = _any_of(control)  # no message may write these
        # nor these, except the assistant's: its earlier reasoning and calls come back as it wrote them
        self._markup = _any_of([*control, *(t.content for t in added if self._is_markup(t.content))])
        self._end_of_turn = self._tried_end()
        self._shows_images = vision is not None and self._tried_images(vision.mark)

    def _tried(self, has_tools: bool) -> TemplateForm:
        """Finds the form that the tokenizer's own template wants; a family's takes text and shows no calls.

        Raises ValueError where there are several templates and none is the default.
        """
        if not self.is_own:
            return TemplateForm(hidden=("calls", "tools"))
        chosen(self.tokenizer.chat_template, has_tools)
        return try_out(lambda messages, tools: self._apply(messages, tools, add_generation_prompt=True), has_tools)

    def _tried_end(self) -> str | None:
        """Returns the token that the template puts behind an answer, if it puts one there."""
        behind = behind_answer(self._apply, self._forms[False]) if self.is_own else ""
        match = self._markup.match(behind.lstrip())
        return match[0] if match else None

    def _tried_images(self, mark: str) -> bool:
        if self._template is not None:
            return True
        return shows_images(lambda messages, _: self._apply(messages, None, add_generation_prompt=True), mark)

    @property
    def hidden(self) -> tuple[str, ...]:
        """What the template shows in no form: roles (user, assistant, system), calls with their results, tools."""
        shown = self._forms[self._shows_tools].hidden
        return shown if self._shows_tools or "tools" in shown else (*shown, "tools")

    def _is_markup(self, token: str) -> bool:
        """Returns whether a token that is not special to the tokenizer is special to the model; `<h1>` is not."""
        return bool(MARKUP.fullmatch(token)) or (bool(token.strip()) and token in self._source and "<" in token)

    def _reasoning_format(self) -> ReasoningFormat | None:
        """Returns the format of reasoning whose marks are tokens of the model, and which its template or, without one,
        its family uses."""
        for think in filter(None, (self.family.think, THINK)):
            is_used = think.end in self._source or (not self.is_own and think is self.family.think)
            if is_used and all(mark in self._vocabulary for mark in think.marks):
                return think
        return None

    @property
    def _marks(self) -> set[str]:
        """The tokens that the parser of answers has to see."""
        marks = self.tool_format.marks & self._vocabulary.keys()
        return {mark for mark in marks if not self._is_plain(mark)} | {*(self.think.marks if self.think else ())}

    def _is_plain(self, token: str) -> bool:
        """Returns whether a token is a piece of text like others, which other tokens spell, too.

        `>` is one: a model that writes `>` and a line break has a single token for both.
        """
        return token not in self._added and self.encode(token) == [self._vocabulary[token]]

    @property
    def literals(self) -> Literals:
        """The marks as grammars of calls can name them."""
        return Literals(self._marks & self._added)

    @property
    def stop_token_ids(self) -> list[int]:
        """The tokens that end an answer beside those that the model's generation config names."""
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        common = [token for family in FAMILIES if not family.ends_begin_turns for token in family.ends]
        known = () if self.is_own else self.family.ends
        used = [token for token in (*common, *self.family.ends) if token in self._source or token in known]
        used += [] if self._end_of_turn is None else [self._end_of_turn]
        return list(dict.fromkeys(end + [self._vocabulary[token] for token in used if token in self._vocabulary]))

    @cached_property
    def longest_token(self) -> int:
        """How many characters one token can stand for."""
        return max(map(len, self._vocabulary))

    def token_id(self, token: str) -> int | None:
        return self._vocabulary.get(token)

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, with nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def thinking(self, prompt_ids: Sequence[int]) -> Literal["open", "closed", "unsaid"]:
        """Returns whether the prompt ends in the reasoning (open), or behind it (closed), or the model decides
        (unsaid)."""
        if self.think is None:
            return "closed"
        begin, end = (self._vocabulary[mark] for mark in self.think.marks)
        last_end = max((at for stop in self.stop_token_ids if (at := _last(prompt_ids, stop)) >= 0), default=-1)
        begun, ended = _last(prompt_ids, begin), _last(prompt_ids, end)
        if max(begun, ended) <= last_end:
            switch = self._vocabulary.get(self.think.switch)
            return "unsaid" if switch is None or switch in prompt_ids else "closed"
        return "open" if begun > ended else "closed"

    def render_chat(self, messages: Sequence[Message], options: RenderOptions | None = None) -> list[int]:
        """Returns the prompt of a conversation.

        Raises InvalidRequest for messages that the template takes neither as they are nor with alternating roles.
        """
        options = options or RenderOptions()
        return self._prompt_ids(self._text(messages, options), options)

    def render_turns(self, messages: Sequence[Message], options: RenderOptions) -> tuple[list[int], tuple[int, ...]]:
        """Returns the prompt, and how many of its tokens would stay if the last message of the user were another one,
        and if the conversation went on after it.

        Each of these places is at a control token; places without one are left out. Raises what `render_chat` raises.
        """
        whole = self._text(messages, options)
        prompt_ids = self._prompt_ids(whole, options)
        last = max((i for i, message in enumerate(messages) if message.role == "user"), default=None)
        if last is None:
            return prompt_ids, ()
        user, assistant = (messages[last].model_copy(update={"role": r, "content": "."}) for r in ("user", "assistant"))
        places = set()
        said = messages if messages[-1].role != "assistant" else messages[: last + 1]  # up to the next answer
        for others in ([*messages[:last], user], [*said, assistant, user]):
            shown = options.image_grids[: num_images(others)]
            try:
                text = self._text(others, replace(options, continues=None, opens=None, image_grids=shown)).text
            except InvalidRequest:
                continue
            num_same = len(commonprefix([whole.text, text]))
            places.add(whole.num_tokens_before(num_same, prompt_ids, self._control, self.encode))
        return prompt_ids, tuple(sorted(places - {0}))

    def _prompt_ids(self, text: PromptText, options: RenderOptions) -> list[int]:
        token_ids = text.encode(self.encode)
        return token_ids + self._closing(token_ids) if text.opens and options.thinks is False else token_ids

    def _text(self, messages: Sequence[Message], options: RenderOptions) -> PromptText:
        from jinja2 import TemplateError

        plain, tools, arguments, seam, mark = self._disarm(messages, options)
        plain, continues, opens = _ending(plain, options.continues, options.opens)
        if continues and plain[-1]["role"] not in ("assistant", "user"):
            raise InvalidRequest(
                "Only a message of the assistant or the user can be continued.", param="continue_final_message"
            )
        ending = {"continue_final_message": continues, "add_generation_prompt": opens}
        switches = {**arguments, **ending, **_switches(options)}
        refusal: Exception | None = None
        tried: list[Attempt] = []
        for attempt, shown in self._attempts(plain, tools, bool(options.image_grids)):
            if (attempt, shown) in tried:
                continue
            tried.append((attempt, shown))
            try:
                text = self._rendered(attempt, shown, mark, switches)
                text = self._show(text, options.image_grids)
            except (TemplateError, *RENDERING_ERRORS) as error:
                refusal = refusal or error
            else:
                check_characters(text, "messages")
                return PromptText(text, seam, opens)
        raise InvalidRequest(
            f"The model's chat template rejects these messages: {refusal}", param="messages"
        ) from refusal

    def _rendered(
        self,
        messages: list[CanonicalMessage],
        tools: list[dict[str, Any]] | None,
        image_mark: str,
        switches: Mapping[str, Any],
    ) -> str:
        """Raises ValueError where the template would leave out a part of the messages, and what the template raises."""
        form = self._forms[tools is not None]
        if self.is_own and (not is_usual(messages, form.ends) or form.hides(messages)):
            lost = hidden_by(lambda twin, shown: self._apply(twin, shown, **switches), form, messages, bool(tools))
            if lost:
                raise ValueError(f"it drops parts of these messages: {', '.join(lost)}")
        text = self._apply(form.of(self._with_images(messages, image_mark)), tools, **switches)
        if not form.has_responses or self._end_of_turn is None:
            return text
        text = self._with_headers(text, self._end_of_turn)
        goes_on = switches["add_generation_prompt"] and messages[-1]["role"] == "tool"
        return self._with_last_header(text, self._end_of_turn, switches) if goes_on else text

    def _with_headers(self, text: str, end: str) -> str:
        """Opens the turns that such a template leaves closed: where calls have text beside them, it ends the turn
        behind their results, and goes on without a header."""
        header = self._plain_header
        if (begin := self._control.match(header)) is None:
            return text
        return re.sub(rf"({re.escape(end)}\s*)(?!{re.escape(begin[0])}|\s|\Z)", lambda match: match[1] + header, text)

    @cached_property
    def _plain_header(self) -> str:
        """The header with nothing behind it that would switch reasoning off."""
        return self._header(enable_thinking=True)

    def _with_last_header(self, text: str, end: str, switches: Mapping[str, Any]) -> str:
        """Does the same at the text's end, where the template may have written what follows the header."""
        before, _, behind = text.rpartition(end)
        header, tail = self._header(**switches), behind.lstrip()
        is_closed = bool(before) and len(tail) < len(header) and header.endswith(tail)
        return f"{before}{end}{behind[: len(behind) - len(tail)]}{header}" if is_closed else text

    def _header(self, **switches: Any) -> str:
        """Returns what the template opens the assistant's turn with."""
        user = self._forms[False].of([{"role": "user", "content": "."}])
        closed, opened = (self._apply(user, None, **{**switches, "add_generation_prompt": o}) for o in (False, True))
        return opened.removeprefix(closed) if opened.startswith(closed) else ""

    def _attempts(
        self, plain: list[CanonicalMessage], tools: list[dict[str, Any]], has_images: bool
    ) -> Iterator[Attempt]:
        """Yields the messages in forms that the template may take, each with the tools that it is to render."""
        folded = fold_tools(plain, self.tool_format, self._tool_prompt(tools))
        alternating = (alternate(folded, self.family.lead if self._template else "{}\n\n"), None)
        if self.family.alternates and not has_images and (tools or self._template or not is_alternating(plain)):
            yield alternating
            return
        if self._knows(plain, tools):
            native = prefix_tool_names(plain)
            for messages in (native, apart(native), *(change(native) for change in SYSTEM_CHANGES)):
                yield messages, tools or None
        for messages in (folded, *(change(folded) for change in SYSTEM_CHANGES)):
            yield messages, None
        yield alternating

    def _knows(self, messages: Sequence[CanonicalMessage], tools: Sequence[dict[str, Any]]) -> bool:
        """Returns whether the template itself shows these tools, and the calls and results in these messages."""
        if tools and not self._shows_tools:
            return False
        has_calls = any(message["role"] == "tool" or "tool_calls" in message for message in messages)
        return not (has_calls and "calls" in self._forms[bool(tools)].hidden)

    def _tool_prompt(self, tools: Sequence[dict[str, Any]]) -> str:
        if not tools:
            return ""
        lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
        return self.tool_format.prompt.format(tools="\n".join(lines))

    def _closing(self, token_ids: list[int]) -> list[int]:
        """Returns the end of the reasoning, for templates that have no switch for it."""
        state = self.thinking(token_ids)
        if self.think is None or state == "closed":
            return []
        return self.encode(self.think.closing if state == "open" else self.think.off)

    def _with_images(self, messages: list[CanonicalMessage], mark: str) -> list[CanonicalMessage]:
        """Returns the messages with images as parts, which a tokenizer's template expects; a family's takes text."""
        result: list[CanonicalMessage] = []
        for message in messages:
            first, *others = message["content"].split(mark)
            parts = [{"type": "text", "text": first}]
            for text in others:
                parts += [{"type": "image"}, {"type": "text", "text": text}]
            content: Any = [part for part in parts if part.get("text") != ""]
            if self._template is not None and self._vision is not None:
                content = self._vision.mark.join(self._vision.frame).join([first, *others])
            result.append({**message, "content": content if others else message["content"]})
        return result

    def _show(self, text: str, image_grids: Sequence[Sequence[Grid]]) -> str:
        """Puts each image's tokens in the place of its mark, which only the template writes."""
        if not image_grids:
            return text
        assert self._vision is not None
        between = text.split(self._vision.mark)
        if len(between) != len(image_grids) + 1:
            raise ValueError("it shows a different number of images")
        shown = [self._vision.prompt_text(grids) for grids in image_grids]
        return between[0] + "".join(image + rest for image, rest in zip(shown, between[1:], strict=True))

    @property
    def sees(self) -> bool:
        return self._shows_images

    @property
    def hides_images(self) -> bool:
        """Whether the model could see, were it not for its template."""
        return self._vision is not None and not self._shows_images

    def _disarm(
        self, messages: Sequence[Message], options: RenderOptions
    ) -> tuple[list[CanonicalMessage], list[dict[str, Any]], dict[str, Any], str, str]:
        """Cuts the control tokens that messages, tools and arguments spell in two, as text/seams.py explains.

        Returns these with the seam, and a character that stands for an image in the text.
        """
        effort = {} if options.effort is None else {"reasoning_effort": options.effort}
        tools, arguments = options.tools, {**options.arguments, **effort}
        try:
            plain = canonical(messages, "" if self.sees else None)
            seam, mark = unused_characters(json.dumps([plain, *tools, arguments], ensure_ascii=False), 2)
            if self.sees and num_images(messages):
                plain = canonical(messages, mark)
            safe_tools, safe_arguments = cut([*tools], self._markup, seam), cut(arguments, self._markup, seam)
            return [self._safe(message, seam) for message in plain], safe_tools, safe_arguments, seam, mark
        except RecursionError as error:
            raise InvalidRequest("The arguments of a tool call are nested too deeply.", param="messages") from error

    def _safe(self, message: CanonicalMessage, seam: str) -> CanonicalMessage:
        tokens = self._control if message["role"] == "assistant" else self._markup
        return {
            key: cut(value, self._markup if key == "tool_calls" else tokens, seam) for key, value in message.items()
        }

    @property
    def chat_template(self) -> str:
        """The text of the template for conversations without tools."""
        return self._template or chosen(self.tokenizer.chat_template, False)

    def _apply(self, messages: list[CanonicalMessage], tools: list[dict[str, Any]] | None, **switches: Any) -> str:
        template = self._template or chosen(self.tokenizer.chat_template, tools is not None)
        switches |= {"tools": tools, "chat_template": template}
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **switches)
        assert isinstance(text, str)
        return text

    def render_text(self, prompt: str, has_bos: bool = True) -> list[int]:
        """Returns the token ids of a completion's prompt. has_bos: whether the tokenizer adds its BOS token.

        A BOS token that the text itself spells is not doubled.
        """
        check_characters(prompt, "prompt")
        token_ids = list(self.tokenizer(prompt, add_special_tokens=has_bos).input_ids)
        bos = self.tokenizer.bos_token_id
        return token_ids[1:] if bos is not None and token_ids[:2] == [bos, bos] else token_ids

    @property
    def fills_gaps(self) -> bool:
        """Whether the tokenizer has the marks of a fill-in-the-middle format."""
        return self._gap_marks is not None

    @property
    def _gap_marks(self) -> tuple[str, ...] | None:
        vocabulary = self._vocabulary
        return next((marks for marks in FILL_IN_THE_MIDDLE if all(mark in vocabulary for mark in marks)), None)

    def render_fill_in_the_middle(self, prefix: str, suffix: str) -> tuple[list[int], list[int]]:
        """Returns the prompt that asks for the text between two others, and the tokens that end the answer.

        Raises InvalidRequest for models without such a format.
        """
        vocabulary, marks = self.tokenizer.get_vocab(), self._gap_marks
        if marks is None:
            raise InvalidRequest(
                "suffix is not supported: this model has no fill-in-the-middle format.",
                param="suffix",
                code="unsupported_value",
            )
        check_characters(suffix, "suffix")
        ends = [vocabulary[token] for token in (*END_OF_FILE, *marks) if token in vocabulary]
        return self.render_text(f"{marks[0]}{prefix}{marks[1]}{suffix}{marks[2]}"), ends


def _switches(options: RenderOptions) -> dict[str, Any]:
    """Returns the switch of reasoning under the names that several families' templates use."""
    return {} if options.thinks is None else {"enable_thinking": options.thinks, "thinking": options.thinks}


def _last(token_ids: Sequence[int], token_id: int) -> int:
    """Returns the last place of a token; -1 if it is nowhere."""
    return next((at for at in range(len(token_ids) - 1, -1, -1) if token_ids[at] == token_id), -1)


def _any_of(tokens: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _ending(
    messages: list[CanonicalMessage], continues: bool | None, opens: bool | None
) -> tuple[list[CanonicalMessage], bool, bool]:
    """Returns the messages, whether the last one is continued, and whether the assistant's turn is opened.

    Where the request is silent, what the assistant has begun is continued; a blank message is no beginning.
    """
    last = messages[-1]
    is_assistant, has_text = last["role"] == "assistant", bool(last["content"].strip())
    if is_assistant and not has_text and "tool_calls" not in last and len(messages) > 1 and continues is not False:
        return messages[:-1], False, True
    if continues is None:
        continues = is_assistant and has_text and "tool_calls" not in last and not opens
    return messages, continues, not continues if opens is None else opens
