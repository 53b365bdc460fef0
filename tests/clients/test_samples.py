"""The samples of the interface documents, as a reader pastes them: only address and model name are replaced.

Each runs in a process of its own. Headings name the document and its section.
"""

import ast
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import requests
from process import Server

MODEL = "qwen2.5-coder-0.5b"
ADDRESS = "http://localhost:8000"
DOCUMENTED_MODELS = r"qwen3-0\.6b|qwen-7b-chat|gemma-7b"


def on(server: Server, sample: str) -> str:
    assert ADDRESS in sample
    return re.sub(DOCUMENTED_MODELS, MODEL, sample.replace(ADDRESS, server.url))


def run(*command: str) -> str:
    """What it printed."""
    environment = {**os.environ, "OPENAI_API_KEY": "unused", "PYTHONIOENCODING": "utf-8"}
    ended = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=500)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def events(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream that is well-formed and ends as documented."""
    assert text.endswith("\n\ndata: [DONE]\n\n")
    lines = text.split("\n\n")[:-2]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


def differences(documented: Any, answer: Any, path: str = "") -> list[str]:
    """What a document shows and the answer lacks, or has as another type; a null may be anything."""
    if documented is None:
        return []
    if type(documented) is not type(answer):
        return [f"{path or 'the answer'} is {answer!r}, documented is {documented!r}"]
    if isinstance(documented, list):
        return [problem for item in answer for problem in differences(documented[0], item, f"{path}[]")]
    if isinstance(documented, dict):
        lacking = [f"{path}.{name} is missing" for name in documented if name not in answer]
        return lacking + [
            p
            for name in documented.keys() & answer
            for p in differences(documented[name], answer[name], f"{path}.{name}")
        ]
    return []


# --- nano-vllm-server-api.zh.md: 快速开始

HEALTH = "curl http://localhost:8000/health"


def test_the_health_sample_says_ok(server: Server) -> None:
    assert json.loads(run("bash", "-c", on(server, HEALTH)))["status"] == "ok"


def test_the_description_is_at_the_documented_address(server: Server) -> None:
    page = requests.get(server.url + "/docs", timeout=30)
    assert page.status_code == 200 and "swagger" in page.text


# --- nano-vllm-server-api.zh.md: 聊天补全

CHAT = """
import requests

# 非流式请求
response = requests.post(
    "http://localhost:8000/v1/chat/completions",
    headers={"Content-Type": "application/json"},
    json={
        "model": "qwen3-0.6b",
        "messages": [
            {"role": "system", "content": "你是一个有用的AI助手。"},
            {"role": "user", "content": "你好，请介绍一下你自己。"}
        ],
        "temperature": 0.7,
        "max_tokens": 100,
        "stream": False
    }
)

print(response.json())
"""

CHAT_ANSWER = """
{
  "id": "req_1234567890abcdef",
  "object": "chat.completion",
  "created": 1703123456,
  "model": "qwen3-0.6b",
  "choices": [
    {
      "message": {
        "role": "assistant",
        "content": "你好！我是一个AI助手..."
      },
      "index": 0,
      "logprobs": null,
      "finish_reason": "stop"
    }
  ],
  "usage": {
    "prompt_tokens": 25,
    "completion_tokens": 15,
    "total_tokens": 40
  }
}
"""

CHAT_STREAM = """
import requests
import json

response = requests.post(
    "http://localhost:8000/v1/chat/completions",
    headers={"Content-Type": "application/json"},
    json={
        "model": "qwen3-0.6b",
        "messages": [
            {"role": "user", "content": "请用一句话解释什么是人工智能。"}
        ],
        "temperature": 0.7,
        "max_tokens": 50,
        "stream": True
    },
    stream=True
)

for line in response.iter_lines():
    if line:
        line = line.decode('utf-8')
        if line.startswith('data: '):
            data_str = line[6:]
            if data_str == '[DONE]':
                break
            try:
                data = json.loads(data_str)
                if 'choices' in data and data['choices']:
                    delta = data['choices'][0].get('delta', {})
                    if 'content' in delta:
                        print(delta['content'], end='', flush=True)
            except json.JSONDecodeError:
                continue
"""


def test_the_chat_sample_prints_an_answer_of_the_documented_shape(server: Server) -> None:
    answer = ast.literal_eval(run(sys.executable, "-c", on(server, CHAT)))
    assert differences(json.loads(CHAT_ANSWER), answer) == []
    assert answer["object"] == "chat.completion" and answer["model"] == MODEL
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"].strip()
    usage = answer["usage"]
    assert 0 < usage["completion_tokens"] <= 100
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_streaming_chat_sample_prints_an_answer(server: Server) -> None:
    printed = run(sys.executable, "-c", on(server, CHAT_STREAM))
    assert any("\u4e00" <= character <= "\u9fff" for character in printed) and "None" not in printed


# --- nano-vllm-server-api.zh.md: 文本补全, 模型列表

COMPLETION = """
import requests

response = requests.post(
    "http://localhost:8000/v1/completions",
    headers={"Content-Type": "application/json"},
    json={
        "model": "qwen3-0.6b",
        "prompt": "人工智能是",
        "temperature": 0.7,
        "max_tokens": 50,
        "stream": False
    }
)

print(response.json())
"""

MODEL_LIST = """
import requests

response = requests.get("http://localhost:8000/v1/models")
models = response.json()

for model in models['data']:
    print(f"模型: {model['id']}, 所有者: {model['owned_by']}")
"""


def test_the_completion_sample_prints_a_continuation(server: Server) -> None:
    answer = ast.literal_eval(run(sys.executable, "-c", on(server, COMPLETION)))
    assert answer["object"] == "text_completion" and answer["model"] == MODEL
    [choice] = answer["choices"]
    assert choice["text"].strip() and choice["finish_reason"] in ("stop", "length")
    assert 0 < answer["usage"]["completion_tokens"] <= 50


def test_the_model_list_sample_prints_the_model_and_its_owner(server: Server) -> None:
    assert run(sys.executable, "-c", on(server, MODEL_LIST)) == f"模型: {MODEL}, 所有者: local\n"


# --- nano-vllm-server-api.zh.md: 流式响应, 错误处理

CURL_STREAM = r"""
# 使用 curl 测试流式响应
curl -X POST http://localhost:8000/v1/chat/completions \
  -H "Content-Type: application/json" \
  -d '{
    "model": "qwen3-0.6b",
    "messages": [{"role": "user", "content": "你好"}],
    "stream": true
  }'
"""

FIRST_EVENT = """
{"id":"chatcmpl-123","object":"chat.completion.chunk","created":1234567890,"model":"qwen3-0.6b",
"choices":[{"index":0,"delta":{"role":"assistant"},"finish_reason":null}]}
"""

ERROR = """
{
  "error": {
    "message": "错误描述",
    "type": "error_type",
    "code": "error_code"
  }
}
"""


def test_the_curl_sample_prints_the_documented_events(server: Server) -> None:
    first, *middle, last = events(run("bash", "-c", on(server, CURL_STREAM)))
    assert differences(json.loads(FIRST_EVENT), first) == []
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert text_of(middle).strip()
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in [first, *middle])
    assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] == "stop"
    chunks = [first, *middle, last]
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize(("body", "status"), [({"model": "nobody"}, 404), ({"temperature": 3}, 400)])
def test_errors_have_the_documented_status_and_shape(server: Server, body: dict[str, Any], status: int) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "你好"}], **body}
    answer = requests.post(server.url + "/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code == status
    assert differences(json.loads(ERROR), answer.json()) == []


# The table of 支持的参数: the ends of every range that the model's context does not bound
EXTREMES: list[dict[str, Any]] = [
    {"temperature": 0.0, "top_p": 1.0, "n": 1, "max_tokens": 1, "presence_penalty": -2.0, "frequency_penalty": -2.0},
    {"temperature": 2.0, "n": 128, "max_tokens": 1, "presence_penalty": 2.0, "frequency_penalty": 2.0, "user": "me"},
    {"temperature": 1.0, "top_p": 0.0, "max_tokens": 1, "user": None},
]


@pytest.mark.parametrize("body", EXTREMES)
@pytest.mark.parametrize(
    ("path", "question"),
    [("chat/completions", {"messages": [{"role": "user", "content": "你好"}]}), ("completions", {"prompt": "你好"})],
    ids=["chat", "completions"],
)
def test_every_parameter_takes_the_ends_of_its_documented_range(
    server: Server, path: str, question: dict[str, Any], body: dict[str, Any]
) -> None:
    answer = requests.post(f"{server.url}/v1/{path}", json={"model": MODEL, **question, **body}, timeout=500)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == body.get("n", 1)


# --- openai-interface-design.zh.md: 核心兼容接口, 模型发现接口

CHAT_BODY = """
{
  "model": "qwen-7b-chat",
  "messages": [
    {"role": "system", "content": "你是一个有帮助的助手"},
    {"role": "user", "content": "请解释人工智能的概念"}
  ],
  "max_tokens": 512,
  "temperature": 0.7,
  "stream": false
}
"""

CHAT_BODY_ANSWER = """
{
  "id": "chatcmpl-123",
  "object": "chat.completion",
  "created": 1677652288,
  "model": "qwen-7b-chat",
  "choices": [
    {
      "index": 0,
      "message": {
        "role": "assistant",
        "content": "人工智能是..."
      },
      "finish_reason": "stop"
    }
  ],
  "usage": {
    "prompt_tokens": 15,
    "completion_tokens": 128,
    "total_tokens": 143
  }
}
"""

COMPLETION_BODY = """
{
  "model": "gemma-7b",
  "prompt": "请解释人工智能的概念",
  "max_tokens": 512,
  "temperature": 0.7
}
"""

COMPLETION_BODY_ANSWER = """
{
  "id": "cmpl-123",
  "object": "text_completion",
  "created": 1677652288,
  "model": "gemma-7b",
  "choices": [
    {
      "text": "人工智能是...",
      "index": 0,
      "logprobs": null,
      "finish_reason": "length"
    }
  ],
  "usage": {
    "prompt_tokens": 15,
    "completion_tokens": 128,
    "total_tokens": 143
  }
}
"""  # put together from the document's route

MODELS_ANSWER = """
{
  "object": "list",
  "data": [
    {
      "id": "qwen-7b-chat",
      "object": "model",
      "created": 1677616000,
      "owned_by": "local",
      "permission": [
        {
          "id": "modelperm-123",
          "object": "model_permission",
          "created": 1677616000,
          "allow_create_engine": false,
          "allow_sampling": true,
          "allow_logprobs": true,
          "allow_search_indices": false,
          "allow_view": true,
          "allow_fine_tuning": false,
          "organization": "*",
          "group": null,
          "is_blocking": false
        }
      ],
      "root": "qwen-7b-chat",
      "parent": null
    }
  ]
}
"""  # its permission, "[...]" there, from the document's route


@pytest.mark.parametrize(
    ("path", "body", "documented"),
    [("chat/completions", CHAT_BODY, CHAT_BODY_ANSWER), ("completions", COMPLETION_BODY, COMPLETION_BODY_ANSWER)],
    ids=["chat", "completions"],
)
def test_the_documented_bodies_get_the_documented_answers(
    server: Server, path: str, body: str, documented: str
) -> None:
    data = re.sub(DOCUMENTED_MODELS, MODEL, body).encode()
    headers = {"Content-Type": "application/json"}
    answer = requests.post(f"{server.url}/v1/{path}", data=data, headers=headers, timeout=500)
    assert answer.status_code == 200
    assert differences(json.loads(documented), answer.json()) == []
    assert answer.json()["id"].split("-")[0] == json.loads(documented)["id"].split("-")[0]
    assert answer.json()["object"] == json.loads(documented)["object"]
    [choice] = answer.json()["choices"]
    assert (choice["text"] if path == "completions" else choice["message"]["content"]).strip()


def test_the_model_list_is_as_documented(server: Server) -> None:
    models = requests.get(server.url + "/v1/models", timeout=30).json()
    documented = json.loads(MODELS_ANSWER)
    assert differences(documented, models) == []
    [model], [expected] = models["data"], documented["data"]
    expected |= {"id": MODEL, "created": model["created"], "root": MODEL}
    expected["permission"][0] |= {name: model["permission"][0][name] for name in ("id", "created")}
    assert {name: model[name] for name in expected} == expected


# --- openai-interface-design.zh.md: 客户端兼容性

LEGACY_SDK = """
# 使用官方OpenAI SDK
import openai

# 配置指向本地服务
openai.api_base = "http://localhost:8000/v1"
openai.api_key = "your-api-key"  # 可选的认证

# 直接调用（与OpenAI API完全兼容）
response = openai.ChatCompletion.create(
    model="qwen-7b-chat",
    messages=[
        {"role": "system", "content": "你是一个有帮助的助手"},
        {"role": "user", "content": "请解释人工智能的概念"}
    ]
)

print(response.choices[0].message.content)
"""

LANGCHAIN = """
from langchain.llms import OpenAI
from langchain.chat_models import ChatOpenAI

# 使用本地模型
llm = OpenAI(
    openai_api_base="http://localhost:8000/v1",
    model_name="qwen-7b-chat"
)

# 或者使用聊天模型
chat = ChatOpenAI(
    openai_api_base="http://localhost:8000/v1",
    model_name="qwen-7b-chat"
)
"""

CALLS = [
    "llm.predict('人工智能是', max_tokens=20)",
    "llm.invoke('人工智能是', max_tokens=20)",
    "''.join(llm.stream('人工智能是', max_tokens=20))",
    "asyncio.run(llm.ainvoke('人工智能是', max_tokens=20))",
    "chat.predict('你好')",
    "chat.invoke('你好').content",
    "''.join(chunk.content for chunk in chat.stream('你好'))",
    "asyncio.run(chat.ainvoke('你好')).content",
]


def test_the_legacy_sdk_sample_prints_an_answer(server: Server, legacy_python: str) -> None:
    assert run(legacy_python, "-c", on(server, LEGACY_SDK)).strip()


def test_the_langchain_sample_makes_models_that_answer(server: Server, legacy_python: str) -> None:
    calls = "".join(f"print(json.dumps({call}))\n" for call in CALLS)
    texts = [
        json.loads(line)
        for line in run(legacy_python, "-c", f"import asyncio, json\n{on(server, LANGCHAIN)}{calls}").splitlines()
    ]
    assert len(texts) == len(CALLS) and all(text.strip() for text in texts)


# --- gemma3-server.md: Usage with Clients (Example: Open WebUI)


def test_a_client_that_is_given_the_base_url_lists_the_model_and_chats_with_it(server: Server) -> None:
    base_url = server.url + "/v1"
    [model] = requests.get(base_url + "/models", timeout=30).json()["data"]
    body = {"model": model["id"], "messages": [{"role": "user", "content": "Say hello."}]}
    streamed = requests.post(base_url + "/chat/completions", json={**body, "stream": True}, timeout=500)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert text_of(events(streamed.content.decode())).strip()
    whole = requests.post(base_url + "/chat/completions", json={**body, "stream": False}, timeout=500)
    assert whole.json()["choices"][0]["message"]["content"].strip()
