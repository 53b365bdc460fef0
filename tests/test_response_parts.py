"""The parts of /v1/responses that need no model: events made anew, items dropped for room, and text in arguments."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from api.encrypted_reasoning import decoded, encoded
from api.responses.replay import replayed
from api.responses.schemas import (
    OutputCustomCall,
    OutputFunctionCall,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
    ResponseObject,
    ResponseStateEvent,
)
from api.responses.truncation import PromptSize, truncated
from errors import ContextLengthExceeded
from schemas import ChatCompletionRequest
from text.custom_tools import TextArgument

EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
TEXT = st.text(st.characters(codec="utf-8"), max_size=40)


# --- events made anew

OUTPUT: list[Any] = [
    OutputReasoning(content=[ReasoningText(text="Hm.")], encrypted_content=encoded("Hm."), status="completed"),
    OutputMessage(content=[OutputText(text='Say "hi"\n')], status="completed"),
    OutputFunctionCall(call_id="c1", name="f", namespace="n", arguments='{"a": 1}', status="completed"),
    OutputCustomCall(call_id="c2", name="g", input='a "b"\n\U0001f600', status="completed"),
    OutputMessage(content=[OutputText(text="cut")], status="incomplete"),
]


@pytest.mark.parametrize(
    ("status", "last"),
    [
        ("completed", "response.completed"),
        ("incomplete", "response.incomplete"),
        ("failed", "response.failed"),
        ("cancelled", "response.incomplete"),
    ],
)
def test_events_made_anew_lead_to_the_same_response(status: Any, last: str) -> None:
    body = json.loads(ResponseObject(status=status, model="m", output=OUTPUT, store=True).model_dump_json())

    async def read(after: int) -> list[Any]:
        return [event async for event in replayed(body, after)]

    events = asyncio.run(read(-1))
    assert isinstance(events[-1], ResponseStateEvent) and json.loads(events[-1].response.model_dump_json()) == body
    found = [EVENT.validate_python(json.loads(event.model_dump_json())) for event in events]
    assert [event.sequence_number for event in found] == [*range(len(found))] and found[-1].type == last
    done = [event.item.to_dict() for event in found if event.type == "response.output_item.done"]
    assert done == body["output"]
    kinds = {event.type.rpartition(".")[0] for event in found if event.type.endswith(".delta")}
    assert len(kinds) == 4 and Response.model_validate(body)
    assert [event.sequence_number for event in asyncio.run(read(5))] == [*range(6, len(found))]
    for after in (len(found) - 1, len(found), 4000):
        (end,) = asyncio.run(read(after))
        assert end.type == last and end.sequence_number == after + 1, "a number of the first stream may be greater"


def test_what_began_was_neither_incomplete_nor_failed() -> None:
    body = ResponseObject(status="incomplete", model="m", incomplete_details={"reason": "max_output_tokens"})

    async def read() -> list[Any]:
        return [event async for event in replayed(json.loads(body.model_dump_json()))]

    *begun, last = asyncio.run(read())
    assert [event.response.incomplete_details for event in begun] == [None, None]
    assert last.response.incomplete_details == {"reason": "max_output_tokens"}


# --- items dropped for room


def chat(*messages: tuple[str, str], **fields: Any) -> ChatCompletionRequest:
    shown = [{"role": role, "content": content} for role, content in messages]
    for message in shown:
        if message["role"] == "call":
            message |= {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}}]}
    return ChatCompletionRequest.model_validate({"model": "m", "messages": shown, **fields})


def kept(request: ChatCompletionRequest, context: int) -> list[str]:
    """The contents that are left where each character is a token."""

    async def measure(chat: ChatCompletionRequest) -> PromptSize:
        num_tokens = sum(len(str(message.content)) for message in chat.messages)
        if num_tokens > 2 * context:
            raise ContextLengthExceeded("It is far too long.", param="messages")
        return PromptSize(num_tokens, context)

    return [str(message.content) for message in asyncio.run(truncated(request, measure)).messages]


def test_the_oldest_items_go_and_the_system_and_the_last_question_stay() -> None:
    request = chat(
        ("system", "S" * 10), ("user", "a" * 10), ("assistant", "b" * 10), ("developer", "D" * 10), ("user", "c" * 10),
        ("assistant", "d" * 10), ("user", "e" * 10),
    )  # fmt: skip
    assert kept(request, 100) == [str(message.content) for message in request.messages]
    assert kept(request, 80) == ["S" * 10, "b" * 10, "D" * 10, "c" * 10, "d" * 10, "e" * 10]
    assert kept(request, 56) == ["S" * 10, "D" * 10, "d" * 10, "e" * 10]
    assert kept(request, 20) == kept(request, 40) == ["S" * 10, "D" * 10, "e" * 10]


def test_a_call_goes_together_with_its_results() -> None:
    request = chat(
        ("user", "a" * 10), ("call", "b" * 5), ("tool", "c" * 5), ("tool", "d" * 5), ("user", "e" * 10),
        ("call", "f" * 10), ("tool", "g" * 10), ("call", "h" * 10), ("tool", "i" * 10),
    )  # fmt: skip
    everything = [str(message.content) for message in request.messages]
    assert kept(request, 93) == everything[1:] and kept(request, 80) == everything[4:]
    assert kept(request, 50) == kept(request, 9) == ["e" * 10, "h" * 10, "i" * 10]


def test_room_is_left_for_the_answer_up_to_a_quarter_of_the_context() -> None:
    messages = (("user", "a" * 40), ("assistant", "b" * 10), ("user", "c" * 30))
    assert kept(chat(*messages, max_tokens=20), 100) == ["a" * 40, "b" * 10, "c" * 30]
    assert kept(chat(*messages, max_tokens=21), 100) == kept(chat(*messages), 100) == ["b" * 10, "c" * 30]
    assert kept(chat(*messages, max_tokens=90), 107) == ["a" * 40, "b" * 10, "c" * 30]


@given(
    st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "call", "tool"]), TEXT), min_size=1),
    st.integers(1, 200),
)
def test_no_more_goes_than_has_to(messages: list[tuple[str, str]], context: int) -> None:
    request = chat(*messages)
    left = kept(request, context)
    contents = [str(message.content) for message in request.messages]
    remaining = iter(contents)
    assert all(content in remaining for content in left), "the order stays"
    assert left == contents or sum(map(len, contents)) > context - context // 4
    assert left[-1] == contents[-1]


# --- text in arguments


@given(TEXT, st.booleans(), st.lists(st.integers(0, 60), max_size=8), st.sampled_from(["", " ", "\n\t"]))
def test_text_is_read_however_its_json_is_cut(text: str, is_ascii: bool, cuts: list[int], blank: str) -> None:
    written = f'{blank}{{{blank}"input"{blank}:{blank}{json.dumps(text, ensure_ascii=is_ascii)}{blank}}}'
    places = sorted({0, *(cut for cut in cuts if cut < len(written)), len(written)})
    argument = TextArgument()
    read = [argument.add(written[start:end]) for start, end in zip(places, places[1:], strict=False)]
    assert "".join(read) + argument.end() == text
    assert all(part.encode() is not None for part in read), "no half of a character is ever given"


@given(st.text(st.characters(codec="ascii"), max_size=30))
def test_whatever_is_written_as_arguments_gives_some_text(written: str) -> None:
    argument = TextArgument()
    assert isinstance(argument.add(written) + argument.end(), str)


def test_half_a_character_in_an_escape_is_replaced() -> None:
    argument = TextArgument()
    assert argument.add('{"input": "a\\ud83db"}') + argument.end() == "a\ufffdb"


# --- reasoning that clients send back


@given(TEXT)
def test_encoded_reasoning_is_read_again(text: str) -> None:
    assert decoded(encoded(text)) == text


@given(st.text(max_size=60) | TEXT.map(lambda text: encoded(text)[:-1]) | TEXT.map(lambda text: f"reasoning.v1.{text}"))
def test_other_encoded_content_is_nothing(value: str) -> None:
    assert decoded(value) is None
