"""/v1/messages: its answers and events against the official types, and against the same chat's."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx2
import pytest
from anthropic_requests import HELLO, MODEL, WEATHER, answer, ask, events, folded, text_of
from process import Server

from api.messages.input import as_chat
from api.messages.schemas import MessagesRequest, MessageStart
from api.messages.view import PING, MessagesEncoder, collect, stream
from errors import InvalidRequest, Overloaded
from schemas import ChatCompletionChunk, ChunkChoice, Delta, FunctionDelta, ToolCallDelta, Usage
from server.events import EventStream, sse

ORDER = ["message_start", "ping", "content_block_start", "content_block_delta", "content_block_stop"]


def request(**fields: Any) -> MessagesRequest:
    return MessagesRequest.model_validate({"model": "m", "max_tokens": 9, "messages": HELLO, **fields})


def chat(**fields: Any) -> dict[str, Any]:
    return as_chat(request(**fields)).model_dump(exclude_none=True)


def chat_text(server: Server, **body: Any) -> str:
    start = {"model": MODEL, "messages": HELLO, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    reply = server.post("/v1/chat/completions", **{**start, **body})
    return str(reply.json()["choices"][0]["message"]["content"])


# --- answers


def test_an_answer_is_that_of_the_same_chat_and_its_stream_says_the_same(server: Server) -> None:
    whole = answer(server, system="S", temperature=1.0, seed=7)
    assert text_of(whole) == chat_text(
        server, messages=[{"role": "system", "content": "S"}, *HELLO], temperature=1.0, seed=7
    )
    told = events(ask(server, system="S", temperature=1.0, seed=7, stream=True).text)
    kinds = [event["type"] for event in told]
    assert [kind for i, kind in enumerate(kinds) if kinds[i - 1] != kind] == [*ORDER, "message_delta", "message_stop"]
    again = folded(told)
    for name in ("content", "stop_reason", "stop_sequence", "model", "role", "type"):
        assert again[name] == whole[name]
    assert again["usage"]["output_tokens"] == whole["usage"]["output_tokens"] == 24
    assert (whole["stop_reason"], whole["model"]) == ("max_tokens", MODEL)


def test_the_first_event_has_the_prompts_tokens_and_those_that_were_cached_are_counted_apart(server: Server) -> None:
    body: dict[str, Any] = {
        "system": "What comes first is longer than a block of sixteen tokens.",
        "stream": True,
    }
    ask(server, **body)
    first, *_, last, _ = events(ask(server, **body).text)
    begun, ended = first["message"]["usage"], last["usage"]
    assert begun["cache_read_input_tokens"] >= 16 and begun["output_tokens"] == 0
    for name in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"):
        assert begun[name] == ended[name]
    count = ask(server, "/count_tokens", system=body["system"]).json()
    assert count == {"input_tokens": ended["input_tokens"] + ended["cache_read_input_tokens"]}


def test_counting_is_of_the_prompt_with_its_tools_and_generates_nothing(thinking_server: Server) -> None:
    counted = ask(thinking_server, "/count_tokens", tools=[WEATHER]).json()["input_tokens"]
    usage = answer(thinking_server, tools=[WEATHER], thinking={"type": "adaptive"})["usage"]
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert counted > ask(thinking_server, "/count_tokens").json()["input_tokens"] + 100


def test_a_stop_sequence_is_named_and_not_part_of_the_answer(server: Server) -> None:
    whole = text_of(answer(server))
    stopped = answer(server, stop_sequences=["never", whole[5]])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", whole[5])
    assert text_of(stopped) == whole[: whole.index(whole[5])]
    *_, last, _ = events(ask(server, stop_sequences=[whole[5]], stream=True).text)
    assert last["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": whole[5]}


def test_a_bound_of_tokens_beyond_the_context_is_no_mistake(server: Server) -> None:
    """Clients send one number to all models; the context ends the answer."""
    told = answer(server, max_tokens=64_000, temperature=0)
    usage = told["usage"]
    assert told["stop_reason"] == "max_tokens"
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["output_tokens"] == 480


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_forced_call_is_valid_and_its_arguments_are_streamed(thinking_server: Server, choice: Any) -> None:
    body = {"tools": [WEATHER], "tool_choice": choice, "thinking": {"type": "disabled"}, "max_tokens": 300}
    told = answer(thinking_server, temperature=1, seed=3, ignore_eos=False, **body)
    assert told["stop_reason"] == "tool_use"
    for block in told["content"]:
        assert block["type"] == "tool_use" and block["input"]["city"] in ("Rome", "Oslo") and block["id"]
    again = folded(events(ask(thinking_server, temperature=1, seed=3, ignore_eos=False, stream=True, **body).text))
    assert [block["input"] for block in again["content"]] == [block["input"] for block in told["content"]]
    assert again["stop_reason"] == "tool_use"


def test_several_calls_are_made_only_where_they_are_wanted(thinking_server: Server) -> None:
    """With a seed that the same chat answers with two."""
    tool = {"name": "weather", "input_schema": WEATHER["input_schema"]}
    body: dict[str, Any] = {"tools": [tool], "thinking": {"type": "disabled"}, "max_tokens": 300, "temperature": 1}
    for disable, count in ((False, 2), (True, 1)):
        choice = {"type": "any", "disable_parallel_tool_use": disable}
        told = answer(thinking_server, tool_choice=choice, seed=5, ignore_eos=False, **body)
        assert len(told["content"]) == count


def test_thoughts_are_a_block_with_a_signature_and_come_back(thinking_server: Server) -> None:
    from models import byte_tokenizer

    think = byte_tokenizer(has_marks=True).convert_tokens_to_ids("<think>")
    body: dict[str, Any] = {"thinking": {"type": "enabled", "budget_tokens": 5}, "logit_bias": {str(think): 100}}
    told = answer(thinking_server, **body)
    thought = told["content"][0]
    assert thought["type"] == "thinking" and thought["thinking"] and thought["signature"]
    assert folded(events(ask(thinking_server, stream=True, **body).text))["content"] == told["content"]
    messages = [*HELLO, {"role": "assistant", "content": told["content"]}, {"role": "user", "content": "And?"}]
    assert chat(messages=messages)["messages"][1]["reasoning_content"] == thought["thinking"]
    assert answer(thinking_server, messages=messages)["content"]


def test_thoughts_that_the_client_does_not_want_to_see_come_back_by_their_signature() -> None:
    parts = [chunk(Delta(reasoning_content="Hm, ")), chunk(Delta(reasoning_content="é")), chunk(Delta(content="A"))]
    omitted = request(thinking={"type": "adaptive", "display": "omitted"})

    async def told() -> list[Any]:
        return [event.model_dump() async for event in stream(omitted, chunks(*parts, chunk(Delta(), "stop")))]

    content = folded(asyncio.run(told()))["content"]
    assert content[0]["thinking"] == "" and content[1]["text"] == "A"
    back = [*HELLO, {"role": "assistant", "content": content}, {"role": "user", "content": "And?"}]
    assert chat(messages=back)["messages"][1]["reasoning_content"] == "Hm, é"
    foreign = [{"type": "thinking", "thinking": "", "signature": "EuYBCkQ="}, {"type": "text", "text": "A"}]
    assert "reasoning_content" not in chat(messages=[*HELLO, {"role": "assistant", "content": foreign}])["messages"][1]


def test_the_form_of_an_answer_is_enforced(server: Server) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    for place in ({"output_config": {"format": {"type": "json_schema", "schema": schema}}},
                  {"output_format": {"type": "json_schema", "schema": schema}}):  # fmt: skip
        told = answer(server, max_tokens=200, temperature=1, seed=1, ignore_eos=False, **place)
        assert json.loads(text_of(told)) in ({"n": 1}, {"n": 2})


# --- what requests become


def test_the_line_that_names_who_pays_does_not_reach_the_prompt() -> None:
    line = "x-anthropic-billing-header: cc_version=2.1; cch=0f3a;"
    for system in (
        [{"type": "text", "text": line}, {"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}],
        f"{line}\nS",
        [{"type": "text", "text": f"{line}\n\nS"}],
    ):
        assert chat(system=system)["messages"][0] == {"role": "system", "content": "S"}
    assert chat(system=line)["messages"] == HELLO and chat(system=[])["messages"] == HELLO
    kept = [{"type": "text", "text": "S"}, {"type": "text", "text": line}]
    assert chat(system=kept)["messages"][0]["content"] == f"S\n\n{line}"


def test_messages_keep_their_order_and_a_system_message_its_place() -> None:
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
        {"role": "system", "content": [{"type": "text", "text": "S"}, {"type": "text", "text": "T"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm", "signature": "s"}, {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "C"}, {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Å"}},
            {"type": "tool_use", "id": "t2", "name": "weather", "input": {}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": "12"},
            {"type": "tool_result", "tool_use_id": "t2", "is_error": True, "content": [{"type": "text", "text": "no"}]},
            {"type": "text", "text": "D"},
            {"type": "image", "source": {"type": "url", "url": "https://x/y"}},
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}]},
        {"role": "system", "content": "U"},
    ]  # fmt: skip
    calls = [
        {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Å"}'}},
        {"id": "t2", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
    ]
    shown = [
        {"type": "text", "text": "D"},
        {"type": "image_url", "image_url": {"url": "https://x/y"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
    ]
    assert chat(messages=conversation)["messages"] == [
        {"role": "user", "content": "A\nB"},
        {"role": "system", "content": "S\n\nT"},
        {"role": "assistant", "content": "C", "reasoning_content": "Hm", "tool_calls": calls},
        {"role": "tool", "content": "12", "tool_call_id": "t1"},
        {"role": "tool", "content": "Error:\nno", "tool_call_id": "t2"},
        {"role": "user", "content": shown},
        {"role": "system", "content": "U"},
    ]


@pytest.mark.parametrize(
    ("thinking", "effort", "expected"),
    [
        (None, None, {}),
        ({"type": "adaptive"}, None, {}),
        ({"type": "adaptive"}, "max", {"reasoning_effort": "xhigh"}),
        ({"type": "enabled", "budget_tokens": 2000}, None, {"enable_thinking": True, "thinking_token_budget": 2000}),
        ({"type": "disabled"}, "high", {"enable_thinking": False}),
        (None, "low", {"reasoning_effort": "low"}),
    ],
)
def test_thinking_and_effort_are_the_switches_of_reasoning(thinking: Any, effort: Any, expected: Any) -> None:
    made = chat(**({"thinking": thinking} if thinking else {}), output_config={"effort": effort})
    names = ("enable_thinking", "thinking_token_budget", "reasoning_effort")
    assert {name: made[name] for name in names if name in made} == expected


def test_tools_of_anthropics_servers_are_left_out_and_named(thinking_server: Server) -> None:
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
    reply = ask(thinking_server, tools=[WEATHER, search])
    assert reply.status_code == 200
    assert "tools[1].web_search_20250305" in reply.headers["x-ignored-fields"]
    assert [tool["function"]["name"] for tool in chat(tools=[WEATHER, search])["tools"]] == ["weather"]
    forced = ask(thinking_server, tools=[WEATHER, search], tool_choice={"type": "tool", "name": "web_search"})
    assert forced.status_code == 400 and "tools[1].web_search_20250305" in forced.json()["error"]["message"]


def test_unknown_betas_and_fields_are_named_and_known_ones_pass(server: Server) -> None:
    betas = "claude-code-20250219, new-thing-2027-01-01,effort-2025-11-24"
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 2, "foo": 1, "context_management": {"edits": []}}
    reply = httpx2.post(f"{server.url}/v1/messages?beta=true", json=body, headers={"anthropic-beta": betas})
    assert reply.status_code == 200 and reply.headers["x-ignored-betas"] == "new-thing-2027-01-01"
    assert reply.headers["x-ignored-fields"] == "foo"
    assert "x-ignored-betas" not in ask(server).headers and "x-ignored-fields" not in ask(server).headers


# --- events


async def chunks(*items: Any) -> AsyncGenerator[ChatCompletionChunk]:
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item


def chunk(delta: Delta | None = None, reason: Any = None, **more: Any) -> ChatCompletionChunk:
    choices = [] if delta is None else [ChunkChoice(index=0, delta=delta, finish_reason=reason)]
    return ChatCompletionChunk(model="m", choices=choices, **more)


def encoded(*items: Any) -> str:
    async def all_of(events: AsyncIterator[bytes]) -> bytes:
        return b"".join([event async for event in events])

    return asyncio.run(all_of(sse(stream(request(), chunks(*items)), MessagesEncoder()))).decode()


def test_an_error_in_the_middle_is_the_last_event() -> None:
    told = events(encoded(chunk(Delta(content="a")), Overloaded("Wait.")))
    assert told[-1]["type"] == "error" and told[-1]["error"] == {"type": "overloaded_error", "message": "Wait."}
    assert "message_stop" not in [event["type"] for event in told]
    with pytest.raises(InvalidRequest, match="messages"):
        asyncio.run(collect(stream(request(), chunks(InvalidRequest("messages[0]: bad", param="messages")))))


def test_reasoning_text_and_calls_are_blocks_of_their_own_in_their_order() -> None:
    call = {"index": 0, "id": "c1", "type": "function"}
    parts = [
        chunk(Delta(role="assistant", content="")),
        chunk(Delta(reasoning_content="Hm")),
        chunk(Delta(content="A")),
        chunk(Delta(content="B")),
        chunk(Delta(tool_calls=[ToolCallDelta(**call, function=FunctionDelta(name="f", arguments='{"a"'))])),
        chunk(Delta(tool_calls=[ToolCallDelta(index=0, function=FunctionDelta(arguments=": 1}"))])),
        chunk(Delta(tool_calls=[ToolCallDelta(**{**call, "id": "c2"}, function=FunctionDelta(name="g"))])),
        chunk(Delta(), "tool_calls"),
        chunk(usage=Usage(prompt_tokens=5, completion_tokens=4, total_tokens=9)),
    ]
    told = folded(events(encoded(*parts)))
    thought, said, f, g = told["content"]
    assert (thought["thinking"], said["text"]) == ("Hm", "AB") and thought["signature"]
    assert (f["id"], f["name"], f["input"]) == ("c1", "f", {"a": 1}) and (g["id"], g["input"]) == ("c2", {})
    assert told["stop_reason"] == "tool_use" and told["usage"]["input_tokens"] == 5
    whole = asyncio.run(collect(stream(request(), chunks(*parts))))
    assert [block.model_dump() for block in whole.content] == told["content"]


def test_a_call_that_was_cut_off_has_the_arguments_that_came() -> None:
    delta = ToolCallDelta(
        index=0, id="c", type="function", function=FunctionDelta(name="f", arguments='{"a": "b", "c": "d')
    )
    whole = asyncio.run(collect(stream(request(), chunks(chunk(Delta(tool_calls=[delta])), chunk(Delta(), "length")))))
    assert whole.content[0].model_dump()["input"] == {"a": "b"} and whole.stop_reason == "max_tokens"


def test_a_long_prompt_is_no_reason_for_pings_before_the_beginning() -> None:
    async def slowly() -> AsyncGenerator[ChatCompletionChunk]:
        await asyncio.sleep(0.2)
        yield chunk(Delta(content="A"), known_usage=Usage(prompt_tokens=5, completion_tokens=0, total_tokens=5))
        yield chunk(Delta(), "stop", usage=Usage(prompt_tokens=5, completion_tokens=1, total_tokens=6))

    async def told(silence: float) -> list[Any]:
        return [event.model_dump() async for event in stream(request(), slowly(), silence)]

    early, late = (asyncio.run(told(silence)) for silence in (0.01, 5))
    assert [event["type"] for event in early] == [event["type"] for event in late]
    assert early[0]["message"]["usage"]["input_tokens"] == 0 and late[0]["message"]["usage"]["input_tokens"] == 5
    assert early[-2] == late[-2] and early[-2]["usage"]["input_tokens"] == 5


def test_a_client_that_leaves_while_nothing_has_come_ends_the_work() -> None:
    ended: list[str] = []

    async def never() -> AsyncGenerator[ChatCompletionChunk]:
        try:
            await asyncio.sleep(60)
            yield chunk(Delta())
        finally:
            ended.append("ended")

    async def leave() -> None:
        answer = stream(request(), never(), 0.01)
        assert isinstance(await anext(answer), MessageStart)
        await answer.aclose()

    asyncio.run(leave())
    assert ended == ["ended"]


def test_silence_is_broken_by_pings() -> None:
    """Clients read them; comments do not reach their clocks."""
    sent: list[bytes] = []

    async def slowly() -> AsyncGenerator[bytes]:
        yield b"a"
        await asyncio.sleep(0.3)
        yield b"b"

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def answer_slowly() -> None:
        encoder = MessagesEncoder()
        response = EventStream(slowly(), encoder.failure, {}, silence=0.1, format=encoder.format)
        state = type("State", (), {"failure": None})()
        await response({"type": "http", "state": {"deadline": state}}, receive, send)

    asyncio.run(answer_slowly())
    assert PING in sent and sent.index(b"a") < sent.index(PING) < sent.index(b"b")
