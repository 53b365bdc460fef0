"""What a model is told and what it writes, through the real server: what the official SDK holds in the end.

The model repeats its question to the letter, so that the question says what it writes: calls as models really write
them, say.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from call_forms import FORMS, TOOLS, X, marked, xml
from models import CHATML, byte_tokenizer, save_repeating_checkpoint
from openai import OpenAI
from process import MAIN, serve
from test_call_repairs import NO_CALLS

from text.tool_calls.element_calls import GLM_XML, QWEN_XML
from text.tool_calls.gemma_calls import GEMMA_CALLS
from text.tool_calls.json_calls import MARKED
from text.tool_calls.tool_format import ToolFormat

LENGTH = 180  # tokens of what it repeats
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
NESTED: Any = [{"type": "function", "function": {"name": name, "parameters": own}} for name, own in TOOLS.items()]
FLAT: Any = [{"type": "function", "strict": False, **tool["function"]} for tool in NESTED]
STYLES = (MARKED, QWEN_XML, GLM_XML, GEMMA_CALLS)
Calls = list[tuple[str, Any]]
Answer = tuple[str, Calls, str | None]  # content, calls, finish reason


PARTS_CHATML = (  # content is a list of parts here, and nothing else
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@contextmanager
def repeating(directory: Path, template: str, lag: int = 0, has_marks: bool = False) -> Iterator[OpenAI]:
    """A client of a server whose model repeats the question; without marks that are tokens nothing guards calls."""
    tokenizer = byte_tokenizer(has_marks)
    tokenizer.chat_template = template
    save_repeating_checkpoint(directory / "Repeater", tokenizer, lag or LENGTH + len(tokenizer.encode(TAIL)))
    with serve(MAIN, MODEL_PATH=str(directory / "Repeater"), DTYPE="float32") as server:
        server.wait_until_healthy()
        with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            yield client


@pytest.fixture(scope="module", params=STYLES, ids=lambda style: str(style.name))
def repeater(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ToolFormat, OpenAI]]:
    """A style, and a client of a model that was taught it."""
    style: ToolFormat = request.param
    with repeating(tmp_path_factory.mktemp("models"), taught(style)) as client:
        yield style, client


def taught(style: ToolFormat) -> str:
    """A template that shows tools, and how to call them."""
    system = f"'<|im_start|>system\\n' + (tools | tojson) + '{' '.join(style.signs)}<|im_end|>\\n'"
    return "{% if tools %}{{ " + system + " }}{% endif %}" + CHATML


def question(text: str) -> Any:
    """What makes the model write `text`, behind blank lines."""
    return [{"role": "user", "content": "\n" * (LENGTH - len(text.encode())) + text}]


def fits(own: ToolFormat, text: str, style: ToolFormat) -> bool:
    """Whether a text is of this style, and short enough to be repeated."""
    return own is style and len(text.encode()) <= LENGTH


def behind_blanks(content: str | None) -> str:
    return (content or "").lstrip("\n")


def calls_of(message: Any) -> Calls:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


def whole(client: OpenAI, text: str, **body: Any) -> Answer:
    own: Any = {"messages": question(text), "tools": NESTED, **body}
    answer = client.chat.completions.create(model="Repeater", temperature=0, **own)
    message = answer.choices[0].message
    return behind_blanks(message.content), calls_of(message), answer.choices[0].finish_reason


def streamed(client: OpenAI, text: str, **body: Any) -> Answer:
    """As the SDK's own helper puts the chunks together."""
    own: Any = {"messages": question(text), "tools": NESTED, **body}
    with client.chat.completions.stream(model="Repeater", temperature=0, **own) as stream:
        choice = stream.get_final_completion().choices[0]
    return behind_blanks(choice.message.content), calls_of(choice.message), choice.finish_reason


def response(client: OpenAI, text: str, **body: Any) -> Answer:
    own: Any = {"input": body.get("messages") or question(text), "tools": FLAT}
    answer = client.responses.create(model="Repeater", temperature=0, **own)
    calls = [(item.name, json.loads(item.arguments)) for item in answer.output if item.type == "function_call"]
    return behind_blanks(answer.output_text), calls, "tool_calls" if calls else "stop"


def answers(client: OpenAI, texts: list[str]) -> list[Answer]:
    """Each in one of the three ways in turn, many at a time."""
    ways = cycle((whole, streamed, response))
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda way, text: way(client, text), ways, texts))


@pytest.mark.thinned(3)
def test_what_is_repaired_reaches_a_client_as_calls(repeater: tuple[ToolFormat, OpenAI]) -> None:
    style, client = repeater
    texts = {text: (content, calls, "tool_calls") for own, text, content, calls in FORMS if fits(own, text, style)}
    assert len(texts) > 8
    assert dict(zip(texts, answers(client, [*texts]), strict=True)) == texts


@pytest.mark.thinned(3)
def test_what_cannot_be_read_reaches_a_client_to_the_letter(repeater: tuple[ToolFormat, OpenAI]) -> None:
    style, client = repeater
    texts = [text for own, text in NO_CALLS if fits(own, text, style)]
    assert len(texts) > 3
    assert answers(client, texts) == [(text, [], "stop") for text in texts]


@pytest.mark.thinned(3)
def test_a_call_that_the_length_cuts_is_not_called_one(repeater: tuple[ToolFormat, OpenAI]) -> None:
    style, client = repeater
    text = next(text for own, text, _, calls in FORMS if own is style and calls == [X])
    answer = client.chat.completions.create(
        model="Repeater", messages=question(text), tools=NESTED, temperature=0, max_tokens=LENGTH - 20
    )
    assert answer.choices[0].finish_reason == "length"


def test_a_template_that_takes_parts_alone_shows_the_model_what_the_user_wrote(tmp_path: Path) -> None:
    with repeating(tmp_path, PARTS_CHATML) as client:
        text, parts = "What is 6 * 7? 六乘七？", question("What is 6 * 7? 六乘七？")
        parts[0]["content"] = [{"type": "text", "text": parts[0]["content"]}]
        for messages in (question(text), parts):
            answer = client.chat.completions.create(model="Repeater", messages=messages, temperature=0)
            assert behind_blanks(answer.choices[0].message.content) == text


def test_a_guarded_call_reaches_a_client_as_it_was_meant(tmp_path: Path) -> None:
    """The mark of a call is a token here, where the assistant has written it: so the model repeats the answer before,
    and a grammar holds behind the mark."""
    tokenizer, tail = byte_tokenizer(has_marks=True), "<|im_end|>\n<|im_start|>user\nAgain" + TAIL
    forms = [
        (marked(xml(("x", "FILLED"), ("n", "5")).replace("</parameter>\n<", "<", 1)), {"n": 5}),
        (marked(xml(("x", "FILLED"), ("maybe", "123"))), {"maybe": "123"}),
        (marked(xml(("x", "FILLED"), ("maybe", "null"))), {"maybe": None}),
    ]
    with repeating(tmp_path, taught(QWEN_XML), LENGTH + len(tokenizer.encode(tail)), has_marks=True) as client:
        for text, arguments in forms:
            path = "a" * (LENGTH - len(tokenizer.encode(text.replace("FILLED", ""))))
            before = {"role": "assistant", "content": text.replace("FILLED", path)}
            again = {"role": "user", "content": "Again"}
            for way in (whole, streamed, response):
                own = {"messages": [{"role": "user", "content": "Hello"}, before, again]}
                assert way(client, "", **own) == ("", [("f", {"x": path, **arguments})], "tool_calls"), text
