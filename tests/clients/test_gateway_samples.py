"""The samples of multi-provider-gateway.zh.md as a reader pastes them; only the address is replaced. The providers are
servers on this machine that speak their formats."""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from conftest import interpreter
from process import Server, serve
from test_samples import events, on, run, text_of
from upstreams import Asked, Reply, completion, message, message_events, told, upstream

PROVIDERS = {
    "OPENAI": ("OPENAI_BASE_URL", "/v1"),
    "GOOGLE": ("GEMINI_BASE_URL", "/v1beta/openai"),
    "ANTHROPIC": ("ANTHROPIC_BASE_URL", ""),
    "DEEPSEEK": ("DEEPSEEK_API_URL", ""),
    "MINMAX": ("MINMAX_API_URL", "/v1/text/chatcompletion_v2"),
    "OLLAMA": ("OLLAMA_BASEURL", ""),
}


def answer(asked: Asked) -> Reply:
    if asked.path.endswith("/embeddings"):
        vector = {"object": "embedding", "index": 0, "embedding": [0.5, 0.25, 0.125]}
        usage = {"prompt_tokens": 9, "total_tokens": 9}
        return Reply.of({"object": "list", "data": [vector], "model": asked.body["model"], "usage": usage})
    if asked.path.endswith("/messages"):
        return Reply.stream(*message_events("夜", "市")) if asked.body.get("stream") else Reply.of(message("夜市"))
    return Reply.stream(*told("夜", "市")) if asked.body.get("stream") else Reply.of(completion("夜市"))


@pytest.fixture(scope="module")
def gateway() -> Iterator[Server]:
    with ExitStack() as stack:
        settings = {}
        for name, (variable, path) in PROVIDERS.items():
            settings[f"{name}_API_KEY"] = "key"
            settings[variable] = stack.enter_context(upstream(answer)).url + path
        command = [interpreter("SERVER_PYTHON"), "-m", "uvicorn", "main:app", "--host", "127.0.0.1", "--port", "0"]
        server = stack.enter_context(serve(command, MAX_MODEL_LEN="2048", **settings))
        server.wait_until_healthy()
        yield server


CURL = """curl -s -X POST "http://localhost:8000/v1/{path}" \\
     -H "Content-Type: application/json" \\
     -d '{body}'"""
CHATS = [
    ("openai/gpt-3.5-turbo", "請介紹臺灣的夜市文化。", {"temperature": 0.7}),
    ("openai/gpt-3.5-turbo", "請介紹臺灣的夜市文化。", {"temperature": 0.7, "stream": True}),
    ("claude/claude-3-haiku-20240307", "Hello, how are you today?", {"temperature": 0.5, "max_tokens": 100}),
    ("gemini/gemini-1.5-flash-latest", "寫一首關於春天的小詩。", {"temperature": 0.8, "stream": True}),
    ("deepseek/deepseek-chat", "解釋什麼是量子糾纏，用簡單易懂的方式。", {"temperature": 0.7}),
    ("minmax/abab6-chat", "簡述一下羅馬帝國的崛起與衰落。", {"temperature": 0.6, "stream": True}),
    ("ollama/llama3", "你好！", {"temperature": 0.7}),
]


@pytest.mark.parametrize(("model", "question", "options"), CHATS)
def test_the_curl_samples_of_chats_print_answers(
    gateway: Server, model: str, question: str, options: dict[str, object]
) -> None:
    messages = [{"role": "system", "content": "你是一個有用的助手。"}, {"role": "user", "content": question}]
    body = json.dumps({"model": model, "messages": messages, **options}, ensure_ascii=False)
    printed = run("bash", "-c", on(gateway, CURL.format(path="chat/completions", body=body)))
    if "stream" in options:
        assert text_of(events(printed)) == "夜市"
    else:
        assert json.loads(printed)["choices"][0]["message"]["content"] == "夜市"


@pytest.mark.parametrize("model", ["text-embedding-3-small", "models/embedding-001", "ollama/nomic-embed-text"])
def test_the_curl_samples_of_embeddings_print_vectors(gateway: Server, model: str) -> None:
    body = json.dumps({"model": model, "input": "這是一段需要嵌入的文本。"}, ensure_ascii=False)
    printed = json.loads(run("bash", "-c", on(gateway, CURL.format(path="embeddings", body=body))))
    assert printed["data"][0]["embedding"] == [0.5, 0.25, 0.125]


def test_a_hub_that_is_out_of_reach_is_told_to_curl(gateway: Server) -> None:
    """The sample's model has to be downloaded first."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = json.dumps({"model": "huggingface/meta-llama/Llama-3-8B-Instruct", "messages": messages, "max_tokens": 50})
    printed = json.loads(run("bash", "-c", on(gateway, CURL.format(path="chat/completions", body=body))))
    assert "choices" in printed or printed["error"]["code"] in (
        "upstream_unreachable",
        "model_not_found",
        "model_loading",
    )


EMBEDDINGS_BY_SDK = """
from openai import OpenAI
client = OpenAI(
    base_url="http://localhost:8000/v1",
    api_key="dummy-key"
)
try:
    embedding_response = client.embeddings.create(
        model="huggingface/sentence-transformers/all-MiniLM-L6-v2",
        input="我喜歡在陽光明媚的日子裡散步。"
    )
    if not embedding_response.data:
        print("API 回應中沒有 embedding data。")
    else:
        print("Embedding 向量 (前5個維度):")
        print(embedding_response.data[0].embedding[:5])
        print(f"模型: {embedding_response.model}")
        print(f"總 Token 用量: {embedding_response.usage.total_tokens}")
except Exception as e:
    print(f"呼叫 Embedding API 時發生錯誤: {e}")
"""
EMBEDDINGS_BY_REQUESTS = """
import requests
import json
api_url = "http://localhost:8000/v1/embeddings"
headers = {"Content-Type": "application/json"}
data = {"model": "text-embedding-3-small", "input": "這是一段需要嵌入的文本。"}
try:
    response = requests.post(api_url, headers=headers, data=json.dumps(data))
    response.raise_for_status()
    result = response.json()
    print(f"模型: {result['model']}")
    print(f"向量維度: {len(result['data'][0]['embedding'])}")
except requests.exceptions.RequestException as e:
    print(f"請求錯誤: {e}")
"""
CHAT_BY_SDK = """
from openai import OpenAI
client = OpenAI(base_url="http://localhost:8000/v1", api_key="dummy-key")
try:
    chat_completion = client.chat.completions.create(
        model="deepseek/deepseek-chat",
        messages=[
            {"role": "system", "content": "你是一個樂於助人的AI助理。"},
            {"role": "user", "content": "你好，請用繁體中文介紹一下你自己。"}
        ],
        temperature=0.7,
        max_tokens=150
    )
    if chat_completion.choices:
        print("AI 回應:")
        print(chat_completion.choices[0].message.content)
        print(f"ID: {chat_completion.id}")
        print(f"Token 用量: {chat_completion.usage}")
except Exception as e:
    print(f"呼叫 Chat Completion API 時發生錯誤: {e}")
"""
STREAM_BY_SDK = """
from openai import OpenAI
client = OpenAI(base_url="http://localhost:8000/v1", api_key="dummy-key")
try:
    print("AI 串流回應:")
    stream = client.chat.completions.create(
        model="MODEL",
        messages=[{"role": "user", "content": "寫一個關於太空探險的短故事。"}],
        stream=True,
        temperature=0.8
    )
    for chunk in stream:
        if chunk.choices[0].delta.content is not None:
            print(chunk.choices[0].delta.content, end="", flush=True)
    print("串流結束。")
except Exception as e:
    print(f"呼叫 Chat Completion API (串流) 時發生錯誤: {e}")
"""
STREAM_BY_REQUESTS = """
import requests
import json
api_url = "http://localhost:8000/v1/chat/completions"
headers = {"Content-Type": "application/json"}
data = {
    "model": "MODEL",
    "messages": [{"role": "user", "content": "請用中文介紹臺灣的夜市文化，並列出5個著名夜市。"}],
    "temperature": 0.7,
    "stream": True
}
with requests.post(api_url, headers=headers, data=json.dumps(data), stream=True) as response:
    response.raise_for_status()
    for line in response.iter_lines():
        if line:
            decoded_line = line.decode('utf-8')
            if decoded_line.startswith('data: '):
                json_data = decoded_line[len('data: '):]
                if json_data == "[DONE]":
                    break
                chunk = json.loads(json_data)
                if chunk.get('choices') and len(chunk['choices']) > 0:
                    delta = chunk['choices'][0].get('delta', {})
                    if 'content' in delta:
                        print(delta['content'], end='', flush=True)
    print("串流回應結束")
"""
STREAMED = ["openai/gpt-3.5-turbo", "claude/claude-3-haiku-20240307", "gemini/gemini-1.5-flash-latest",
            "deepseek/deepseek-chat", "minmax/abab6-chat", "ollama/llama3"]  # fmt: skip


def python(gateway: Server, sample: str) -> str:
    return run(sys.executable, "-c", on(gateway, sample))


def test_the_sdks_samples_print_answers(gateway: Server) -> None:
    printed = python(gateway, CHAT_BY_SDK)
    assert "夜市" in printed and "Token 用量: CompletionUsage(" in printed
    vectors = python(gateway, EMBEDDINGS_BY_SDK)
    assert "Embedding 向量" in vectors and "總 Token 用量: 1" in vectors
    assert "向量維度: 3" in python(gateway, EMBEDDINGS_BY_REQUESTS)


@pytest.mark.parametrize("model", STREAMED)
@pytest.mark.parametrize("sample", [STREAM_BY_SDK, STREAM_BY_REQUESTS], ids=["openai", "requests"])
def test_the_streaming_samples_print_every_providers_answer(gateway: Server, sample: str, model: str) -> None:
    assert "夜市串流" in python(gateway, sample.replace("MODEL", model)).replace("\n", "")
