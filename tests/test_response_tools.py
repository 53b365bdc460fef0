"""Tools of /v1/responses: namespaces, custom tools, and those that a server would have to run; as Codex sends them."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from process import Server
from pydantic import TypeAdapter

from api.responses.requests import ResponsesRequest
from api.responses.schemas import ResponsesEvent
from api.responses.view import as_chat, opened, stream
from errors import InvalidRequest
from schemas import ChatCompletionChunk, ChatCompletionRequest, ChunkChoice, Delta, FunctionDelta, ToolCallDelta
from text.tools import tool_set_of

MODEL = "Tiny-Qwen3"
EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)


def function(name: str, **fields: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"message": {"type": "string"}}, "required": ["message"]}
    return {"type": "function", "name": name, "description": f"It can {name}.", "parameters": parameters, **fields}


NAMESPACE = {
    "type": "namespace",
    "name": "multi_agent_v1",
    "description": "Work with other agents.",
    "tools": [function("spawn_agent", strict=False), function("wait", defer_loading=True)],
}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Changes files.", "format": {"type": "text"}}
LARK = {"type": "grammar", "syntax": "lark", "definition": 'start: "x"+'}
CODEX: dict[str, Any] = {  # the form of the first request of Codex 0.171
    "model": MODEL,
    "instructions": "You are a coding agent.",
    "input": [
        {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": "Sandbox."}, {"type": "input_text", "text": "Approvals."}],
        },
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Collaborate."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "<environment_context>"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "List the files."}]},
    ],
    "tools": [
        *(function(name, strict=name == "update_plan") for name in ("exec_command", "write_stdin", "update_plan")),
        NAMESPACE,
        {**PATCH, "format": LARK},
        {"type": "web_search", "external_web_access": False},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "5a1c",
    "text": {"verbosity": "low"},
    "client_metadata": {"originator": "codex_exec"},
}
IGNORED = "client_metadata, text.verbosity, tools[4].format, tools[5].web_search"


def request(**fields: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"model": "m", "input": "Hello", **fields})


def names(**fields: Any) -> list[str]:
    return [tool["function"]["name"] for tool in as_chat(request(**fields)).tools or ()]


@pytest.fixture
def thinker(thinking_server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=thinking_server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_request_of_codex_is_answered_and_what_has_no_effect_is_named(thinking_server: Server) -> None:
    answer = thinking_server.post("/v1/responses", **CODEX, max_output_tokens=20)
    assert answer.status_code == 200 and answer.headers["x-ignored-fields"] == IGNORED
    found = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert [EVENT.validate_python(event).sequence_number for event in found] == [*range(len(found))]
    assert found[-1]["type"] == "response.incomplete" and found[-1]["response"]["tools"] == CODEX["tools"][:5]
    assert found[-1]["response"]["text"] == {"format": {"type": "text"}, "verbosity": "low"}


def test_a_namespace_becomes_functions_with_its_name_and_its_description_is_said_once() -> None:
    chat = as_chat(ResponsesRequest.model_validate(CODEX))
    tools = [tool["function"] for tool in chat.tools or ()]
    assert [tool["name"] for tool in tools[3:]] == [
        "multi_agent_v1__spawn_agent",
        "multi_agent_v1__wait",
        "apply_patch",
    ]
    assert tools[3]["description"] == "multi_agent_v1__*: Work with other agents.\n\nIt can spawn_agent."
    assert tools[4]["description"] == "It can wait." and "defer_loading" not in tools[4]
    assert tools[5]["description"].endswith('start: "x"+') and tool_set_of(chat) is not None
    assert [tool.get("strict") for tool in tools] == [None, None, True, None, None, None]


def delta(**call: Any) -> ChatCompletionChunk:
    choice = ChunkChoice(index=0, delta=Delta(tool_calls=[ToolCallDelta(**call)]))
    return ChatCompletionChunk(id="1", created=1, model="m", choices=[choice])


def events_of(body: ResponsesRequest, name: str, *arguments: str) -> list[ResponsesEvent]:
    """The events of an answer that calls a tool, whose arguments come in these pieces."""

    async def chunks() -> AsyncIterator[ChatCompletionChunk]:
        yield delta(index=0, id="call_1", type="function", function=FunctionDelta(name=name, arguments=""))
        for piece in arguments:
            yield delta(index=0, function=FunctionDelta(arguments=piece))

    async def read() -> list[ResponsesEvent]:
        return [event async for event in stream(body, chunks())]

    return asyncio.run(read())


def validated(events: list[ResponsesEvent]) -> list[Any]:
    return [EVENT.validate_python(json.loads(event.model_dump_json())) for event in events]


def test_a_call_in_a_namespace_has_the_plain_name_and_goes_back_as_the_model_wrote_it() -> None:
    events = validated(events_of(request(tools=[NAMESPACE]), "multi_agent_v1__wait", '{"message":', ' "x"}'))
    (item,) = events[-1].response.output
    assert (item.name, item.namespace, item.arguments) == ("wait", "multi_agent_v1", '{"message": "x"}')
    assert [event.item.namespace for event in events if hasattr(event, "item")] == ["multi_agent_v1"] * 2
    chat = as_chat(request(tools=[NAMESPACE], input=[{"role": "user", "content": "Hi"}, item.model_dump()]))
    assert (chat.messages[1].tool_calls or [])[0]["function"]["name"] == "multi_agent_v1__wait"
    (plain,) = validated(events_of(request(tools=[function("wait")]), "wait", "{}"))[-1].response.output
    assert "namespace" not in plain.model_dump(exclude_unset=True)


TEXT = '*** Begin "Patch"\n+\té\U0001f600\\n\n'


@pytest.mark.parametrize("is_ascii", [True, False])
@pytest.mark.parametrize("size", [1, 3, 7, 999])
def test_a_custom_tool_gets_its_text_piece_by_piece(is_ascii: bool, size: int) -> None:
    written = json.dumps({"input": TEXT}, ensure_ascii=is_ascii)
    pieces = [written[start : start + size] for start in range(0, len(written), size)]
    events = validated(events_of(request(tools=[PATCH]), "apply_patch", *pieces))
    deltas = [event.delta for event in events if event.type == "response.custom_tool_call_input.delta"]
    assert "".join(deltas) == TEXT and (len(deltas) > 5 or size > 3)
    (item,) = events[-1].response.output
    assert (item.type, item.name, item.input) == ("custom_tool_call", "apply_patch", TEXT)
    assert [event.type for event in events][-3:-1] == [
        "response.custom_tool_call_input.done",
        "response.output_item.done",
    ]
    assert events[-3].input == TEXT
    sent = as_chat(request(tools=[PATCH], input=[{"role": "user", "content": "Hi"}, item.model_dump()]))
    assert json.loads((sent.messages[1].tool_calls or [])[0]["function"]["arguments"]) == {"input": TEXT}


@pytest.mark.parametrize(
    ("written", "text"), [("{}", ""), ('{"input": "a', "a"), ("plain", "plain"), ('"quoted"', "quoted"), ("", "")]
)
def test_arguments_that_are_no_object_with_the_text_are_the_text(written: str, text: str) -> None:
    (item,) = validated(events_of(request(tools=[PATCH]), "apply_patch", written))[-1].response.output
    assert item.input == text


def test_the_sdk_streams_a_forced_custom_call_that_fits_its_regular_expression(thinker: OpenAI) -> None:
    digits: Any = {**PATCH, "format": {"type": "grammar", "syntax": "regex", "definition": "^[0-9]{3}-[xy\n]{2}$"}}
    options: Any = {"model": MODEL, "input": "Hello", "tools": [digits], "max_output_tokens": 300, "temperature": 1.0}
    options |= {"tool_choice": {"type": "custom", "name": "apply_patch"}, "extra_body": {"enable_thinking": False}}
    with thinker.responses.stream(**options) as events:
        deltas = [event.delta for event in events if event.type == "response.custom_tool_call_input.delta"]
        (item,) = events.get_final_response().output
    assert item.type == "custom_tool_call" and item.input == "".join(deltas)
    assert item.input[:3].isdigit() and item.input[3] == "-" and set(item.input[4:]) <= {"x", "y", "\n"}
    assert len(item.input) == 6


def test_custom_tools_of_chats_are_called_with_text_whole_and_streamed(thinker: OpenAI) -> None:
    grammar = {"syntax": "regex", "definition": '[a-c"]{4}'}
    custom: Any = {"type": "custom", "custom": {"name": "grep", "format": {"type": "grammar", "grammar": grammar}}}
    options: Any = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "tools": [custom]}
    options |= {"tool_choice": {"type": "custom", "custom": {"name": "grep"}}, "max_tokens": 300, "seed": 3}
    options |= {"extra_body": {"enable_thinking": False}}
    choice = thinker.chat.completions.create(**options).choices[0]
    (call,) = choice.message.tool_calls or ()
    assert call.type == "custom" and call.custom.name == "grep" and len(call.custom.input) == 4
    assert set(call.custom.input) <= {*'abc"'} and choice.finish_reason == "tool_calls"
    assert "function" not in call.model_dump(exclude_unset=True)
    deltas = [
        delta.model_dump(exclude_unset=True)
        for chunk in thinker.chat.completions.create(**options, stream=True)
        for choice in chunk.choices
        for delta in choice.delta.tool_calls or ()
    ]
    assert deltas[0]["custom"]["name"] == "grep" and deltas[0]["type"] == "custom" and deltas[0]["id"]
    assert "".join(delta["custom"]["input"] for delta in deltas) == call.custom.input
    assert all(set(delta) == {"index", "custom"} for delta in deltas[1:]) and len(deltas) > 1


TOOLS = [function("f"), NAMESPACE, PATCH, {"type": "web_search"}]


@pytest.mark.parametrize(
    ("choice", "chosen"),
    [
        ({"type": "function", "name": "f"}, ["f"]),
        ({"type": "function", "name": "wait"}, ["multi_agent_v1__wait"]),
        ({"type": "function", "name": "wait", "namespace": "multi_agent_v1"}, ["multi_agent_v1__wait"]),
        ({"type": "function", "function": {"name": "multi_agent_v1__wait"}}, ["multi_agent_v1__wait"]),
        ({"type": "custom", "name": "apply_patch"}, ["apply_patch"]),
        ({"type": "namespace", "name": "multi_agent_v1"}, ["multi_agent_v1__spawn_agent", "multi_agent_v1__wait"]),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "namespace", "name": "multi_agent_v1"}]},
            ["multi_agent_v1__spawn_agent", "multi_agent_v1__wait"],
        ),
        (
            {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "web_search"}, {"type": "custom", "name": "apply_patch"}, {"name": "f"}],
            },
            ["f", "apply_patch"],
        ),
    ],
)
def test_a_choice_may_name_any_tool_that_the_client_runs(choice: dict[str, Any], chosen: list[str]) -> None:
    tools = tool_set_of(as_chat(request(tools=TOOLS, tool_choice=choice)))
    assert tools is not None and list(tools.schemas) == chosen
    assert tools.is_required is (choice.get("mode") != "auto")
    echoed = opened(request(tools=TOOLS, tool_choice=choice)).model_dump()
    assert Response.model_validate(echoed) and is_official(echoed["tool_choice"])


OFFICIAL: TypeAdapter[Any] = TypeAdapter(Response.model_fields["tool_choice"].annotation)


def is_official(choice: Any) -> bool:
    return OFFICIAL.validate_python(choice) is not None


@pytest.mark.parametrize(
    ("sent", "echoed"),
    [
        ({"reasoning": {"effort": "zzz", "summary": "auto"}},
         {"reasoning": {"effort": None, "summary": "auto", "generate_summary": None}}),
        ({"tools": [{"type": "zzz"}, {"type": "web_search"}, {"type": "custom", "custom": {"name": "c"}}]},
         {"tools": [{"type": "custom", "name": "c"}]}),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True, "other": 1}}]},
         {"tools": [{"type": "function", "name": "f", "strict": True}]}),
        ({"tools": [{"type": "custom", "custom": {"name": "c", "format": {"type": "grammar", "grammar": LARK}}}]},
         {"tools": [{"type": "custom", "name": "c", "format": LARK}]}),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [function("f"), {"type": "web_search"}]}]},
         {"tools": [{"type": "namespace", "name": "n", "description": "", "tools": [function("f")]}]}),
        ({"tools": TOOLS, "tool_choice": {"type": "namespace", "name": "multi_agent_v1"}},
         {"tool_choice": {"type": "allowed_tools", "mode": "required",
                          "tools": [{"type": "namespace", "name": "multi_agent_v1"}]}}),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
         {"tool_choice": {"type": "function", "name": "f"}}),
        ({"text": {"format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}}},
         {"text": {"format": {"type": "json_schema", "name": "answer", "schema": {"type": "object"}}}}),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True}, "verbosity": "high"}},
         {"text": {"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True}, "verbosity": "high"}}),
        ({"text": {"format": {"type": "json_object"}}}, {"text": {"format": {"type": "json_object"}}}),
        ({}, {"text": {"format": {"type": "text"}}, "tools": [], "tool_choice": "auto", "reasoning": None}),
    ],
)  # fmt: skip
def test_what_a_response_repeats_has_the_official_form(sent: dict[str, Any], echoed: dict[str, Any]) -> None:
    body = request(**sent)
    assert as_chat(body) is not None
    found = opened(body).model_dump(mode="json")
    assert {name: found[name] for name in echoed} == echoed
    response = Response.model_validate(found)
    assert response.to_dict(exclude_unset=True).keys() >= echoed.keys() and is_official(found["tool_choice"])


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "a tool that this server does not have"),
        ({"tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice", "a tool that this server does not have"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]}},
         "tool_choice", "a tool that this server does not have"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice", "runs none of these tools"),
        ({"tool_choice": {"type": "function", "name": "other"}}, "tool_choice", "no tool named 'other'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "must name a tool"),
        ({"tools": [{"type": "namespace", "name": "n"}]}, "tools[0].tools", "must be the list"),
        ({"tools": [{"type": "namespace", "tools": []}]}, "tools[0].name", "the name of the namespace"),
        ({"tools": [*TOOLS, {**NAMESPACE, "tools": [NAMESPACE]}]}, "tools[4].tools[0].type", "'function' or 'custom'"),
        ({"tools": [{"type": "web_search"}, {**NAMESPACE, "tools": [function("a"), function("b c")]}]},
         "tools[1].tools[1].name", "1 to 128 characters"),
        ({"tools": [{**PATCH, "format": {"type": "grammar", "syntax": "regex", "definition": "[z"}}]},
         "tools[0].format", "regular expression is invalid"),
        ({"tools": [{**PATCH, "format": {"type": "grammar", "syntax": "peg", "definition": "x"}}]},
         "tools[0].format.syntax", "'lark' or 'regex'"),
        ({"tools": [function("f"), function("f")]}, "tools", "Two tools are named 'f'"),
        ({"tool_choice": {"type": "namespace", "name": "other"}}, "tool_choice", "no namespace 'other'"),
        ({"tools": [{**NAMESPACE, "description": 5}]}, "tools[0].description", "must be text"),
        ({"tools": [{**NAMESPACE, "tools": [function("a"), function("b", description=5)]}]},
         "tools[0].tools[1].description", "must be text"),
        ({"tools": [function("f", strict="yes")]}, "tools[0].strict", "true or false"),
        ({"tools": [function("f", defer_loading=1)]}, "tools[0].defer_loading", "true or false"),
        ({"tools": [{**PATCH, "description": ["x"]}]}, "tools[0].description", "must be text"),
        ({"metadata": {"a": 5}}, "metadata", "The value of 'a'"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": "yes"}}},
         "text.format.strict", "true or false"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": 5}}, "tool_choice", "a list of tools"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_tools_is_named_where_the_request_has_it(
    thinking_server: Server, body: dict[str, Any], param: str, reason: str
) -> None:
    answer = thinking_server.post("/v1/responses", **{"model": MODEL, "input": "Hello", "tools": TOOLS, **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and reason in error["message"]


def test_tools_that_are_left_out_are_named_and_the_model_does_not_see_them(server: Server) -> None:
    hosted = ["web_search_preview", "file_search", "code_interpreter", "image_generation", "computer", "mcp"]
    hosted += ["local_shell", "shell", "apply_patch", "tool_search", "programmatic_tool_calling", "next_years_tool"]
    sent = [{"type": kind} for kind in hosted]
    assert names(tools=[function("f"), *sent]) == ["f"]
    body = {"model": MODEL, "input": "Hello", "max_output_tokens": 3, "temperature": 0}
    with_hosted, without = (server.post("/v1/responses", **body, **more) for more in ({"tools": sent}, {}))
    listed = ", ".join(sorted(f"tools[{number}].{kind}" for number, kind in enumerate(hosted)))
    assert with_hosted.headers["x-ignored-fields"] == listed
    assert with_hosted.json()["usage"]["input_tokens"] == without.json()["usage"]["input_tokens"]


def test_the_sdk_raises_its_own_error_for_a_choice_of_a_tool_that_is_left_out(client: OpenAI) -> None:
    tools: Any = [{"type": "web_search"}]
    with pytest.raises(BadRequestError, match="does not have"):
        client.responses.create(model=MODEL, input="x", tools=tools, tool_choice={"type": "web_search_preview"})


def test_a_grammar_that_is_not_enforced_is_named_in_chats_too() -> None:
    custom = {"name": "x", "format": {"type": "grammar", "grammar": LARK}}
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "custom", "custom": custom}],
    }
    assert ChatCompletionRequest.model_validate(body).ignored_fields == ["tools[0].custom.format"]


def test_a_bad_grammar_of_a_custom_tool_of_a_chat_is_named() -> None:
    tool = {"type": "custom", "custom": {"name": "x", "format": {"type": "grammar", "grammar": {"syntax": "lark"}}}}
    with pytest.raises(InvalidRequest) as refusal:
        as_chat(request(tools=[tool]))
    assert refusal.value.param == "tools[0].format.definition"
