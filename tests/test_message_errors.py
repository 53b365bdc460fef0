"""What is wrong with a request of the Messages API is said in Anthropic's shape, with the client's names of fields."""

import json
import re
import socket
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic_requests import HELLO, MODEL, WEATHER, ask
from process import MAIN, Server, serve

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "text"}}]}]}, "'document'"),
    ({"messages": [*HELLO, {"role": "assistant", "content": [{"type": "server_tool_use"}]}]}, "messages[1].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]}, "tool_use_id"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].source"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]}, "source.type"),
    ({"system": [{"type": "image"}]}, "system[0].type"),
    ({"tools": [{"description": "x"}]}, "tools[0].name"),
    ({"tools": [{**WEATHER, "input_schema": {"type": "array"}}]}, "tools[0].input_schema"),
    ({"tools": [{**WEATHER, "name": "two words"}]}, "tools[0].name"),
    ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [WEATHER]}, "tool_choice"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
    ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
    ({"container": "c"}, "container"),
    ({"messages": [{"role": "system", "content": ""}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "search_result", "source": "x"}]}]}, "'search_result'"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": "x"}]}]}, "messages[0].content[0].source"),
    ({"temperature": "hot"}, "temperature"),
    ({"stop_sequences": "x"}, "stop_sequences"),
]


@pytest.mark.parametrize(("body", "field"), WRONG)
def test_a_mistake_is_named_as_the_client_sent_it(server: Server, body: dict[str, Any], field: str) -> None:
    for path in ("", "/count_tokens") if body.keys() & {"messages", "system", "tools"} else ("",):
        reply = ask(server, path, **body)
        assert reply.status_code == 400, reply.text
        told = reply.json()
        assert told["type"] == "error" and told["error"]["type"] == "invalid_request_error"
        assert field in told["error"]["message"] and "function" not in told["error"]["message"]
        assert told["request_id"] == reply.headers["request-id"] == reply.headers["x-request-id"]


def test_an_image_is_refused_at_the_place_where_the_client_has_it(server: Server) -> None:
    """In the chat it is another message, because the system's comes before, and the results of tools are apart."""
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
    use = {"type": "tool_use", "id": "t", "name": "weather", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": "x"}
    conversation = [*HELLO, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result, image]}]
    reply = ask(server, system="S", messages=conversation)
    assert reply.status_code == 400 and reply.json()["error"]["message"].startswith("messages[2].content")


def test_a_prompt_that_is_too_long_is_told_so_that_claude_code_understands_it(server: Server) -> None:
    reply = ask(server, messages=[{"role": "user", "content": "x" * 600}])
    assert reply.status_code == 400
    assert re.fullmatch(r"prompt is too long: 6\d\d tokens > 480 maximum", reply.json()["error"]["message"])
    counted = ask(server, "/count_tokens", messages=[{"role": "user", "content": "x" * 600}])
    assert counted.status_code == 200 and counted.json()["input_tokens"] > 600


def test_errors_before_routing_have_anthropics_shape_too(tiny_checkpoint: Any) -> None:
    with serve(MAIN, MODEL_PATH=str(tiny_checkpoint), API_KEYS="key;concurrent=1", MAX_BODY_SIZE="2000") as server:
        body = {"model": MODEL, "messages": HELLO, "max_tokens": 2}

        def post(path: str = "", body: Any = body, **headers: str) -> httpx2.Response:
            return httpx2.post(f"{server.url}/v1/messages{path}", json=body, headers=headers, timeout=60)

        for refused in (post(), post(x_api_key="wrong"), post("/count_tokens", authorization="Bearer wrong")):
            assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"
        server.wait_until_healthy()
        large = post(body={**body, "system": "x" * 3000}, **{"x-api-key": "key"})
        assert large.status_code == 413 and large.json()["error"]["type"] == "request_too_large"
        lost = httpx2.get(f"{server.url}/v1/messages/batches", headers={"x-api-key": "key"})
        assert lost.status_code == 404 and lost.json()["error"]["type"] == "not_found_error"
        for key in (
            {"x-api-key": "key"},
            {"authorization": "Bearer key"},
            {"x-api-key": "", "authorization": "Bearer key"},
        ):
            assert post(**key).status_code == 200
        with anthropic.Anthropic(base_url=server.url, api_key="key", max_retries=0) as client:
            assert client.messages.create(model=MODEL, max_tokens=2, messages=[{"role": "user", "content": "Hi"}])
            with pytest.raises(anthropic.NotFoundError, match="other"):
                client.messages.create(model="other", max_tokens=2, messages=[{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("path", "field"), [("/v1/messages", "request_id"), ("/api/chat", "error"), ("/v2/embed", "message")]
)
def test_a_head_that_cannot_be_read_is_refused_in_the_shape_of_its_path(server: Server, path: str, field: str) -> None:
    for line in (b"content-length: x", b"transfer-encoding: gzip", b"a: " + b"b" * 70_000):
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30) as connection:
            connection.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\n".encode() + line + b"\r\n\r\n")
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        told = json.loads(answer.rpartition(b"\r\n\r\n")[2])
        assert answer.startswith(b"HTTP/1.1 4") and field in told and "param" not in str(told), answer
