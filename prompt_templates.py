"""OpenAI messages -> canonical messages -> token ids; one entry per model family. It knows no engine.

The tokenizer's own chat template always wins; a family's is for tokenizers that have none (GGUF files, base models).
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from errors import InvalidRequest
from schemas import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens that end a turn in some family's template; a model's own configuration (a GGUF's above all) may not name them.
END_OF_TURN = ("<end_of_turn>", "<turn|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>")

MARKUP = re.compile(r"<\|.*\|>|</?(think|tool_call|tool_response|tools?)>|<(start|end)_of_\w+>|<\w+_soft_token>")
SEAMS = [chr(code) for code in [*range(0xFDD0, 0xFDF0), *range(0xF0000, 0xF0100)]]  # in no text that means something

CanonicalMessage = dict[str, Any]  # role: system, user, assistant or tool; content: text

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% if not loop.last or add_generation_prompt %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}"
    "{{ m.content if loop.last and not add_generation_prompt else m.content | trim }}"
    "{% if not loop.last or add_generation_prompt %}{{ '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content if loop.last and not add_generation_prompt else m.content | trim }}"
    "{% if not loop.last or add_generation_prompt %}{{ '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class ImageFormat:
    """How a family's prompts show images. Source: the family's processor in transformers."""

    mark: str  # what the template writes for an image
    token: str  # stands for a piece of it
    before: str
    after: str

    def of(self, num_views: int, tokens_per_view: int) -> str:
        """An image, and then parts of it."""
        view = f"{self.before}{self.mark}{self.token * tokens_per_view}{self.after}"
        if num_views == 1:
            return view
        parts = " ".join([view] * (num_views - 1))
        return f"Here is the original image {view} and here are some crops to help you see better {parts}"


_GEMMA_IMAGES = ImageFormat("<start_of_image>", "<image_soft_token>", "\n\n", "<end_of_image>\n\n")


@dataclass(frozen=True)
class Family:
    """How a family of models is recognised and spoken to."""

    name: str
    model_types: tuple[str, ...]  # beginnings of config.model_type
    marker: str | None  # a token that its chat format needs
    template: str  # Jinja, for a tokenizer without one of its own
    alternates: bool = False  # its templates want user and assistant in turn, and know no system role
    images: ImageFormat | None = None  # of its models that see


# Tokens that mark (what is before the gap, what is after it, where to fill in); models that have them know the task.
FILL_IN_THE_MIDDLE = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen 2.5 Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),  # DeepSeek Coder
)
END_OF_FILE = ("<|endoftext|>", "<|fim_pad|>", "<|file_sep|>", "<|file_separator|>", "<|repo_name|>")  # end a filling


FAMILIES = (
    Family("gemma", ("gemma",), "<start_of_turn>", _GEMMA, alternates=True, images=_GEMMA_IMAGES),
    Family("qwen", ("qwen",), "<|im_start|>", _CHATML),
    Family("llama", ("llama",), "<|start_header_id|>", _LLAMA),
    Family("chatml", ("",), "<|im_start|>", _CHATML),
    Family("generic", ("",), None, _PLAIN),
)


def family_of(model_type: str, vocabulary: Iterable[str]) -> Family:
    """The first family whose type fits and whose marker the tokenizer has."""
    tokens = set(vocabulary)
    return next(
        f for f in FAMILIES if model_type.startswith(f.model_types) and (f.marker is None or f.marker in tokens)
    )


class PromptTemplate:
    """One model's: messages or text in, token ids out. Its methods take milliseconds, more for long prompts."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", model_type: str, tokens_per_image: int = 0) -> None:
        """tokens_per_image: 0 for a model that does not see."""
        self.tokenizer = tokenizer
        self._tokens_per_image = tokens_per_image
        self.detokenizer = _detokenizer(tokenizer)
        self.family = family_of(model_type, tokenizer.get_vocab())
        own = tokenizer.chat_template
        self._template = None if own else self.family.template
        self._source = own if isinstance(own, str) else self.family.template
        self._knows_tools = "tool_calls" in self._source
        added = tokenizer.added_tokens_decoder.values()
        control = [token.content for token in added if token.special]
        self._control = _any_of(control)  # nobody may write these
        # nor these, but for the assistant: its earlier thoughts and calls come back in its own words
        self._markup = _any_of([*control, *(t.content for t in added if self._is_markup(t.content))])

    def _is_markup(self, token: str) -> bool:
        """Of the tokens that are not special to the tokenizer, those that are to the model; `<h1>` is not."""
        return bool(MARKUP.fullmatch(token)) or (bool(token.strip()) and token in self._source and "<" in token)

    @property
    def stop_token_ids(self) -> list[int]:
        """What ends an answer beside the tokens that the model's generation config names."""
        vocabulary = self.tokenizer.get_vocab()
        own = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        return own + [vocabulary[token] for token in END_OF_TURN if token in self._source and token in vocabulary]

    def render_chat(
        self,
        messages: Sequence[Message],
        continues: bool | None = None,
        opens: bool | None = None,
        num_views: Sequence[int] = (),
    ) -> list[int]:
        """The prompt of a conversation.

        num_views: how often each image is shown, whole and in parts.

        continues: the answer goes on where the last message ends; by default if that is the assistant's.
        opens: the prompt ends with the beginning of the assistant's turn; by default unless it continues.
        Raises InvalidRequest for messages that the template takes neither as they are nor with alternating roles.
        """
        from jinja2 import TemplateError

        plain, seam, mark = self._disarm(messages)
        plain, continues, opens = _ending(plain, continues, opens)
        folded = fold_tools(plain)
        if continues and plain[-1]["role"] not in ("assistant", "user"):
            raise InvalidRequest(
                "Only a message of the assistant's or the user's can be continued.", param="continue_final_message"
            )
        attempts = [_with_names(plain) if self._knows_tools else folded]
        if self.family.alternates and not num_views:
            attempts = []
        for attempt in [*attempts, alternate(folded)]:
            try:
                text = self._show(self._apply(self._with_images(attempt, mark), continues, opens), num_views)
            except (TemplateError, TypeError, ValueError, RecursionError) as error:
                refusal = error
            else:
                _check_characters(text, "messages")
                parts = text.split(seam)
                return [i for part in parts for i in self.tokenizer(part, add_special_tokens=False).input_ids]
        raise InvalidRequest(
            f"The model's chat template does not take these messages: {refusal}", param="messages"
        ) from refusal

    def _with_images(self, messages: list[CanonicalMessage], mark: str) -> list[CanonicalMessage]:
        """Content with images as the parts that a tokenizer's template expects; a family's takes text."""
        result: list[CanonicalMessage] = []
        for message in messages:
            first, *others = message["content"].split(mark)
            parts = [{"type": "text", "text": first}]
            for text in others:
                parts += [{"type": "image"}, {"type": "text", "text": text}]
            content: Any = [part for part in parts if part.get("text") != ""]
            if self._template is not None and self.family.images is not None:
                content = self.family.images.mark.join([first, *others])
            result.append({**message, "content": content if others else message["content"]})
        return result

    def _show(self, text: str, num_views: Sequence[int]) -> str:
        """The prompt with each image's tokens in the place of its mark; only the template writes that."""
        if not num_views:
            return text
        assert self.family.images is not None
        between = text.split(self.family.images.mark)
        if len(between) != len(num_views) + 1:
            raise ValueError("it shows another number of images")
        shown = [self.family.images.of(count, self._tokens_per_image) for count in num_views]
        return between[0] + "".join(image + rest for image, rest in zip(shown, between[1:], strict=True))

    @property
    def sees(self) -> bool:
        return bool(self._tokens_per_image) and self.family.images is not None

    def _disarm(self, messages: Sequence[Message]) -> tuple[list[CanonicalMessage], str, str]:
        """Cuts each control token inside a message's text in two with a seam, at which the prompt is tokenized apart:
        what a user writes, such as `<|im_end|>`, stays text and ends no turn. With the seam, and a character that
        stands for an image in the text."""
        try:
            texts = json.dumps(canonical(messages, "" if self.sees else None), ensure_ascii=False)
            free = [character for character in SEAMS if character not in texts][:2]
            if len(free) < 2:
                raise InvalidRequest("The messages hold all of Unicode's noncharacters.", param="messages")
            seam, mark = free
            plain = canonical(messages, mark if self.sees else None)
            return [_cut(message, self._pattern(message), seam) for message in plain], seam, mark
        except RecursionError as error:
            raise InvalidRequest("The arguments of a tool call are nested too deeply.", param="messages") from error

    def _pattern(self, message: CanonicalMessage) -> re.Pattern[str]:
        return self._control if message["role"] == "assistant" else self._markup

    def _apply(self, messages: list[CanonicalMessage], continues: bool, opens: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            messages,
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=opens,
            continue_final_message=continues,
        )
        assert isinstance(text, str)
        return text

    def render_text(self, prompt: str, has_bos: bool = True) -> list[int]:
        """The prompt of a completion, with the one beginning-of-sequence token that the tokenizer adds."""
        _check_characters(prompt, "prompt")
        token_ids = list(self.tokenizer(prompt, add_special_tokens=has_bos).input_ids)
        bos = self.tokenizer.bos_token_id
        return token_ids[1:] if bos is not None and token_ids[:2] == [bos, bos] else token_ids

    def render_gap(self, prefix: str, suffix: str) -> tuple[list[int], list[int]]:
        """The prompt that asks for what is between two texts, and the tokens that end the answer.

        Raises InvalidRequest for models without such a format.
        """
        vocabulary = self.tokenizer.get_vocab()
        marks = next((marks for marks in FILL_IN_THE_MIDDLE if all(mark in vocabulary for mark in marks)), None)
        if marks is None:
            raise InvalidRequest(
                "suffix is not supported: this model has no fill-in-the-middle format.",
                param="suffix",
                code="unsupported_value",
            )
        _check_characters(suffix, "suffix")
        ends = [vocabulary[token] for token in (*END_OF_FILE, *marks) if token in vocabulary]
        return self.render_text(f"{marks[0]}{prefix}{marks[1]}{suffix}{marks[2]}"), ends


ROLES = {"developer": "system", "function": "tool"}  # other names of the roles that templates know


def _cut(value: Any, pattern: re.Pattern[str], seam: str) -> Any:
    """The same JSON value with the seam behind the first character of each match in its texts."""
    if isinstance(value, str):
        return pattern.sub(lambda match: match[0][:1] + seam + match[0][1:], value)
    if isinstance(value, list):
        return [_cut(item, pattern, seam) for item in value]
    if isinstance(value, dict):
        return {_cut(key, pattern, seam): _cut(item, pattern, seam) for key, item in value.items()}
    return value


def canonical(messages: Sequence[Message], image_mark: str | None = None) -> list[CanonicalMessage]:
    """What templates expect: text content, four roles, and the arguments of tool calls as objects.

    image_mark: what stands for an image in the text; None: there must be none.

    A participant's name leads the text, since templates have no place for it; a tool's name stays apart.
    """
    result: list[CanonicalMessage] = []
    for number, message in enumerate(messages):
        item: CanonicalMessage = {
            "role": ROLES.get(message.role, message.role),
            "content": _text(message, number, image_mark),
        }
        if item["role"] == "tool":
            item |= {key: value for key in ("name", "tool_call_id") if (value := getattr(message, key))}
        elif message.name:
            item["content"] = f"{message.name}: {item['content']}"
        calls = message.tool_calls or ([{"function": message.function_call}] if message.function_call else [])
        if calls:
            item["tool_calls"] = [_with_object_arguments(call) for call in calls]
        result.append(item)
    return result


def fold_tools(messages: Sequence[CanonicalMessage]) -> list[CanonicalMessage]:
    """The same with tool calls and their results as text, for templates that would leave them out."""
    names = {str(call.get("id")): _called(call).get("name") for m in messages for call in m.get("tool_calls", ())}
    result: list[CanonicalMessage] = []
    for message in messages:
        text, role = message["content"], message["role"]
        if role == "tool":
            name = message.get("name") or names.get(str(message.get("tool_call_id")))
            text, role = f"Result of {name or 'the tool'}:\n{text}", "user"
        calls = [json.dumps(_called(call), ensure_ascii=False) for call in message.get("tool_calls", ())]
        result.append({"role": role, "content": "\n".join(filter(None, [text, *calls]))})
    return result


def _with_names(messages: Sequence[CanonicalMessage]) -> list[CanonicalMessage]:
    """For templates that tell a result by its call: one without a call says itself what it is of."""
    return [
        {**m, "content": f"{m['name']}: {m['content']}"} if m.get("name") and not m.get("tool_call_id") else m
        for m in messages
    ]


def _called(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    return function if isinstance(function, dict) else {}


def _detokenizer(tokenizer: "PreTrainedTokenizerBase") -> Any:
    """What decodes single tokens: the tokenizer's core, in a fifth of the time, where its `decode` adds nothing."""
    from transformers import PreTrainedTokenizerFast

    adds_nothing = all(
        getattr(type(tokenizer), name, None) is getattr(PreTrainedTokenizerFast, name) for name in ("decode", "_decode")
    )
    is_plain = adds_nothing and not tokenizer.clean_up_tokenization_spaces
    return tokenizer.backend_tokenizer if is_plain else tokenizer


def _any_of(tokens: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _ending(
    messages: list[CanonicalMessage], continues: bool | None, opens: bool | None
) -> tuple[list[CanonicalMessage], bool, bool]:
    """How a prompt ends where the request is silent; a blank message of the assistant's is no beginning."""
    last = messages[-1]
    is_assistant, has_text = last["role"] == "assistant", bool(last["content"].strip())
    if is_assistant and not has_text and "tool_calls" not in last and len(messages) > 1 and continues is not False:
        return messages[:-1], False, True
    if continues is None:
        continues = is_assistant and has_text and "tool_calls" not in last and not opens
    return messages, continues, not continues if opens is None else opens


def _text(message: Message, number: int, image_mark: str | None) -> str:
    if not isinstance(message.content, list):
        return message.content or message.refusal or ""
    for index, part in enumerate(message.content):
        param = f"messages[{number}].content[{index}]"
        if part.type == "image_url" and image_mark is not None:
            continue
        if part.type == "image_url":
            raise InvalidRequest("This model does not accept images.", param=param, code="unsupported_value")
        if part.type not in ("text", "refusal"):
            known = "'text'" if image_mark is None else "'text' and 'image_url'"
            raise InvalidRequest(
                f"This model takes content parts of type {known}, and no {part.type!r}.",
                param=param,
                code="unsupported_value",
            )
        if getattr(part, part.type) is None:
            param = f"{param}.{part.type}"
            raise InvalidRequest(f"{param}: Field required", param=param, code="missing_required_parameter")
    return "".join(image_mark or "" if p.type == "image_url" else getattr(p, p.type) for p in message.content)


def _check_characters(text: str, param: str) -> None:
    """JSON can hold half a character, an escape such as \\ud800; UTF-8 and tokenizers cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"The text is no valid Unicode: {error.reason}.", param=param) from error


def _with_object_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(custom := call.get("custom"), dict):  # a tool that takes text
        return {**call, "function": {"name": custom.get("name"), "arguments": {"input": custom.get("input")}}}
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"] or "{}")}}
    except (ValueError, RecursionError):
        return call


def alternate(messages: Sequence[CanonicalMessage]) -> list[CanonicalMessage]:
    """The same text with user and assistant in turn, beginning with the user: system text leads the first turn, and
    neighbours of one role become one message."""
    system = [m["content"] for m in messages if m["role"] == "system"]
    turns: list[CanonicalMessage] = []
    for message in messages:
        if message["role"] == "system":
            continue
        role = "assistant" if message["role"] == "assistant" else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + message["content"]
        else:
            turns.append({"role": role, "content": message["content"]})
    if not turns or turns[0]["role"] == "assistant":
        turns.insert(0, {"role": "user", "content": ""})
    turns[0]["content"] = "\n\n".join([*system, turns[0]["content"]]).strip()
    return turns
