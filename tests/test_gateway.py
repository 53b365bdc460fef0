"""Other providers' models through this server: what arrives there, what comes back, and what is said if not."""

import base64
import json
import struct
from typing import Any, get_args

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from process import MAIN, serve
from running_gateway import HELLO, KEYS, Gateway
from upstreams import Reply, chunk, event

from config import Settings
from provider_table import PROVIDERS, AdapterName, ProtocolName
from providers.openai_compatible import ADAPTERS, GeminiAdapter, MiniMaxAdapter, OllamaAdapter
from providers.router import PROTOCOLS, providers_of

SAMPLES = [  # the interface document's, with what each becomes: model, body, provider, path, name there, key's header
    ("openai/gpt-3.5-turbo", "openai", "/v1/chat/completions", "gpt-3.5-turbo", "OPENAI"),
    ("claude/claude-3-haiku-20240307", "claude", "/v1/messages", "claude-3-haiku-20240307", "ANTHROPIC"),
    (
        "gemini/gemini-1.5-flash-latest",
        "gemini",
        "/v1beta/openai/chat/completions",
        "gemini-1.5-flash-latest",
        "GOOGLE",
    ),
    ("deepseek/deepseek-chat", "deepseek", "/chat/completions", "deepseek-chat", "DEEPSEEK"),
    ("minmax/abab6-chat", "minmax", "/v1/text/chatcompletion_v2", "abab6-chat", "MINMAX"),
    ("minimax/MiniMax-M3", "minmax", "/v1/text/chatcompletion_v2", "MiniMax-M3", "MINMAX"),
    ("ollama/llama3", "ollama", "/v1/chat/completions", "llama3", "OLLAMA"),
    ("gpt-4o", "openai", "/v1/chat/completions", "gpt-4o", "OPENAI"),
    ("my-groq/llama-3.3", "my-groq", "/openai/v1/chat/completions", "llama-3.3", "MY_GROQ"),
    ("keyless/org/model", "keyless", "/v1/chat/completions", "org/model", None),
]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(("model", "provider", "path", "name", "key"), SAMPLES)
def test_a_chat_goes_to_its_provider_and_comes_back(
    gateway: Gateway, model: str, provider: str, path: str, name: str, key: str | None, is_stream: bool
) -> None:
    system = {"role": "system", "content": "你是一個有用的助手。"}
    body = {"messages": [system, *HELLO], "temperature": 0.7, **({"stream": True} if is_stream else {})}
    got = gateway.chat(model, headers={"authorization": "Bearer dummy-key"}, **body)
    assert got.status_code == 200, got.text
    where = "deepseek-whole" if provider == "deepseek" and not is_stream else provider
    (asked,) = gateway.providers[where].asked
    assert (asked.path, asked.body["model"]) == (path, name)
    assert "你好" in json.dumps(asked.body, ensure_ascii=False) and asked.body["temperature"] == 0.7
    sent = asked.headers.get("authorization", "") + asked.headers.get("x-api-key", "")
    assert sent.removeprefix("Bearer ") == ("" if key is None else KEYS[key]) and "dummy-key" not in str(asked)
    assert got.headers["x-gateway-provider"] in (provider, model.partition("/")[0])
    if not is_stream:
        assert ChatCompletion.model_validate(got.json()).choices[0].message.content == "Hi!"
        return
    events = got.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [ChatCompletionChunk.model_validate_json(e[6:]) for e in events[:-2] if e.startswith("data: ")]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hi!"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_what_openai_sends_is_relayed_to_the_byte_and_so_is_what_it_is_sent(gateway: Gateway) -> None:
    odd = b'{"id":"x",  "choices" : [],"future":{"a":1.50}}'
    stream = [
        b": hello\n\n",
        b'data:{"choices":[{"x":  "\xe4\xbd\xa0"}]}\r\n\r\n',
        event(chunk({}, "stop")),
        b"data: [DONE]\n\n",
    ]
    cut = b"".join(stream)
    gateway.providers["openai"].script = lambda asked: (
        Reply.stream(*(cut[at : at + 7] for at in range(0, len(cut), 7))) if asked.body.get("stream") else Reply.of(odd)
    )
    future = {"temperature": 9, "n": 500, "new_field": {"deep": [1]}, "messages": [{"role": "robot", "parts": 3}]}
    assert gateway.chat("openai/x", **future).content == odd
    assert gateway.providers["openai"].asked[-1].body == {"model": "x", **future}
    assert gateway.chat("openai/x", stream=True).content == cut


@pytest.mark.parametrize(
    ("model", "provider", "path", "name"),
    [
        ("text-embedding-3-small", "openai", "/v1/embeddings", "text-embedding-3-small"),
        ("openai/text-embedding-3-small", "openai", "/v1/embeddings", "text-embedding-3-small"),
        ("models/embedding-001", "gemini", "/v1beta/openai/embeddings", "models/embedding-001"),
        ("ollama/nomic-embed-text", "ollama", "/v1/embeddings", "nomic-embed-text"),
    ],
)
def test_embeddings_go_to_their_provider(gateway: Gateway, model: str, provider: str, path: str, name: str) -> None:
    got = gateway.post("embeddings", model=model, input="這是一段需要嵌入的文本。")
    assert got.status_code == 200, got.text
    (asked,) = gateway.providers[provider].asked
    assert (asked.path, asked.body["model"], asked.body["input"]) == (path, name, "這是一段需要嵌入的文本。")


def test_geminis_vectors_are_as_long_as_they_should_be_and_in_the_format_that_was_asked(gateway: Gateway) -> None:
    rows = [{"object": "embedding", "embedding": [3.0, 4.0]}, {"object": "embedding", "index": 1, "embedding": [0, 0]}]
    gateway.providers["gemini"].script = lambda asked: Reply.of({"object": "list", "data": rows, "model": "theirs"})
    got = gateway.post("embeddings", model="gemini/e", input=["a", "b"], dimensions=2, encoding_format="base64").json()
    decoded = [struct.unpack("<2f", base64.b64decode(item["embedding"])) for item in got["data"]]
    assert decoded == [pytest.approx((0.6, 0.8)), (0, 0)] and [item["index"] for item in got["data"]] == [0, 1]
    assert got["usage"] == {"prompt_tokens": 0, "total_tokens": 0}
    (asked,) = gateway.providers["gemini"].asked
    assert asked.body["encoding_format"] == "float" and asked.body["dimensions"] == 2
    got = gateway.post("embeddings", model="gemini/e", input=["a", "b"]).json()
    assert [item["embedding"] for item in got["data"]] == [[3.0, 4.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("model", "path"), [("claude/x", "embeddings"), ("deepseek/x", "embeddings"), ("claude/x", "completions")]
)
def test_what_a_provider_does_not_have_is_refused_here(gateway: Gateway, model: str, path: str) -> None:
    got = gateway.post(path, model=model, input="x", prompt="x")
    assert got.status_code == 400 and got.json()["error"]["param"] == "model"
    assert not any(provider.asked for provider in gateway.providers.values())


def test_names_of_this_servers_models_stay_here_and_unknown_ones_are_not_found(gateway: Gateway) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"model": "openai/x"}}}
    assert gateway.chat("Tiny-Qwen3", max_tokens=2, tools=[tool], tool_choice="none").status_code == 200
    for name in ("nobody/x", "gemma", ""):
        assert gateway.chat(name).json()["error"]["code"] == "model_not_found"
    assert not any(provider.asked for provider in gateway.providers.values())


def test_aliases_stand_for_other_models(gateway: Gateway) -> None:
    got = gateway.chat("old-gpt")
    assert gateway.providers["openai"].asked[0].body["model"] == "gpt-new"
    assert got.headers["x-gateway-model"] == "openai/gpt-new"
    assert gateway.chat("other").status_code == 200 and gateway.providers["openai"].asked[1].body["model"] == "模型"
    mine = gateway.chat("mine", max_tokens=2)
    assert mine.json()["model"] == "Tiny-Qwen3" and mine.headers["x-gateway-model"] == "Tiny-Qwen3"


def test_a_missing_key_is_named_at_once(tiny_checkpoint: Any) -> None:
    with serve(MAIN, MODEL_PATH=str(tiny_checkpoint), DTYPE="float32") as server:
        for model, variable in (("openai/x", "OPENAI"), ("claude/x", "ANTHROPIC"), ("minmax/x", "MINMAX")):
            got = server.post("/v1/chat/completions", model=model, messages=HELLO)
            assert got.status_code == 401 and got.json()["error"]["code"] == "provider_not_configured"
            assert f"{variable}_API_KEY" in got.json()["error"]["message"]


def test_every_row_has_its_adapter_and_its_protocol() -> None:
    assert ADAPTERS.keys() == set(get_args(AdapterName)) and PROTOCOLS.keys() == set(get_args(ProtocolName))
    prefixes = [prefix for row in PROVIDERS for prefix in row.prefixes]
    assert providers_of(Settings(_env_file=None)).keys() == set(prefixes) and len(prefixes) == len(set(prefixes))


def test_the_list_of_models_has_all_of_them(gateway: Gateway) -> None:
    ids = [model["id"] for model in gateway.server.get("/v1/models").json()["data"]]
    assert ids[0] == "Tiny-Qwen3" and {"openai/two", "claude/two", "gemini/one", "ollama/two", "my-groq/two"} <= set(
        ids
    )
    assert gateway.server.get("/v1/models/gemini/one").json()["owned_by"] == "gemini"
    assert gateway.server.get("/v1/models/gemini/none").status_code == 404
    num_asked = [len(provider.asked) for provider in gateway.providers.values()]
    gateway.server.get("/v1/models")
    assert [len(provider.asked) for provider in gateway.providers.values()] == num_asked, "they are remembered"


def test_geminis_calls_are_numbered_and_end_as_calls() -> None:
    fixes = GeminiAdapter()
    first = chunk(
        {"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}, "extra_content": {"g": 1}}]}
    )
    second = chunk({"tool_calls": [{"id": "b", "function": {"name": "f", "arguments": "{}"}}]})
    last = chunk({}, "stop")
    assert fixes.chunk(first) and fixes.chunk(second) and fixes.chunk(last)
    calls = [c["choices"][0]["delta"]["tool_calls"][0] for c in (first, second)]
    assert [call["index"] for call in calls] == [0, 1] and calls[0]["extra_content"] == {"g": 1}
    assert last["choices"][0]["finish_reason"] == "tool_calls"
    assert not GeminiAdapter().chunk(chunk({"content": "x"}, "stop"))
    for fixed in (first, second, last):
        ChatCompletionChunk.model_validate(fixed)


def test_minimax_errors_thoughts_and_odd_chunks_are_put_right(gateway: Gateway) -> None:
    provider = gateway.providers["minmax"]
    provider.script = lambda asked: Reply.of({"base_resp": {"status_code": 1004, "status_msg": "login fail"}})
    for is_stream in (False, True):
        got = gateway.chat("minmax/x", stream=is_stream)
        assert got.status_code == 401 and "MINMAX_API_KEY" in got.json()["error"]["message"]
    texts = ["<th", "ink>Hm", "</think>\n\nYes", "."]
    chunks = [event(chunk({"role": "", "content": text})) for text in texts]
    odd = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [{"index": 0}]}
    provider.script = lambda asked: Reply.stream(*chunks, event(chunk({}, "stop")), event(odd))
    parts = [json.loads(e[6:]) for e in gateway.chat("minmax/x", stream=True).text.split("\n\n")[:-2]]
    deltas = [ChatCompletionChunk.model_validate(part).choices[0].delta for part in parts if part["choices"]]
    assert "".join(delta.content or "" for delta in deltas) == "Yes."
    assert "".join((delta.model_extra or {}).get("reasoning_content", "") for delta in deltas) == "Hm"
    assert MiniMaxAdapter().request("chat/completions", body := {"temperature": 0, "max_tokens": 3}) == ["temperature"]
    assert body == {"temperature": 0.01, "max_completion_tokens": 3}


def test_ollama_is_not_sent_what_it_would_ignore(gateway: Gateway) -> None:
    got = gateway.chat("ollama/x", tool_choice="required", user="u")
    assert got.headers["x-gateway-dropped-params"] == "tool_choice, user"
    assert not {"tool_choice", "user"} & gateway.providers["ollama"].asked[0].body.keys()
    image = {"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}
    refusal = gateway.chat("ollama/x", messages=[{"role": "user", "content": [image]}])
    assert refusal.status_code == 400 and refusal.json()["error"]["param"] == "messages[0].content[0]"
    assert gateway.post("embeddings", model="ollama/x", input=[[1, 2]]).status_code == 400
    thought = chunk({"reasoning": "Hm"})
    assert OllamaAdapter().chunk(thought) and thought["choices"][0]["delta"]["reasoning_content"] == "Hm"


def test_the_openai_sdk_reads_relayed_answers_and_errors(gateway: Gateway) -> None:
    with OpenAI(base_url=gateway.server.url + "/v1", api_key="dummy-key", max_retries=0) as client:
        for model in ("openai/gpt-4", "claude/claude-3-opus-20240229", "gemini/gemini-1.5-pro-latest"):
            whole = client.chat.completions.create(model=model, messages=HELLO)
            stream = client.chat.completions.create(model=model, messages=HELLO, stream=True)
            text = "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
            assert whole.choices[0].message.content == text == "Hi!"
        gateway.providers["claude"].script = lambda asked: Reply.of(
            {"type": "error", "error": {"type": "x"}}, 529, x_should_retry="false"
        )
        with pytest.raises(openai.InternalServerError, match="claude"):
            client.chat.completions.create(model="claude/x", messages=HELLO)
