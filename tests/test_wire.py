"""What clients rely on: streams that add up to whole answers, Open WebUI's ways, and the table of errors."""

import http.client
import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion
from process import MAIN, Server, serve
from raw_http import processor_seconds

MODEL = "Tiny-Qwen3"
HELLO: Any = [{"role": "user", "content": "Hello"}]


def chat(server: Server, **body: Any) -> httpx2.Response:
    return server.post("/v1/chat/completions", **{"model": MODEL, "messages": HELLO, "max_tokens": 8, **body})


def chunks_of(response: httpx2.Response) -> list[dict[str, Any]]:
    *events, done, end = response.text.split("\n\n")
    assert response.status_code == 200 and done == "data: [DONE]" and end == ""
    return [json.loads(event.removeprefix("data: ")) for event in events]


# --- a stream adds up to the whole answer


def random_parameters(rng: random.Random) -> dict[str, Any]:
    choices: dict[str, list[Any]] = {
        "temperature": [0, 0.5, 1.3, 2],
        "top_p": [0.3, 0.9, 1],
        "top_k": [-1, 3, 40],
        "min_p": [0, 0.2],
        "presence_penalty": [-1, 0, 1.5],
        "frequency_penalty": [0, 2],
        "repetition_penalty": [1, 1.2],
        "n": [1, 2, 3],
        "max_tokens": [1, 2, 17, 60],
        "min_tokens": [0, 1],
        "stop": ["a", ["e", "zz"], "\n", "\ufffd", "世"],
        "logit_bias": [{"64": 3, "65": -100}],
        "ignore_eos": [True],
        "seed": [rng.getrandbits(40)],
    }
    chosen = {name: rng.choice(values) for name, values in choices.items() if rng.random() < 0.5}
    return {**chosen, "seed": rng.getrandbits(40)}


@pytest.mark.parametrize("number", range(25))
def test_a_streamed_chat_adds_up_to_the_whole_one(server: Server, number: int) -> None:
    rng = random.Random(number)
    parameters = random_parameters(rng)
    if rng.random() < 0.5:
        parameters |= {"logprobs": True, "top_logprobs": rng.randrange(4)}
    whole = chat(server, **parameters).json()
    assert ChatCompletion.model_validate(whole)
    chunks = chunks_of(chat(server, **parameters, stream=True, stream_options={"include_usage": True}))
    assert counts(chunks[-1]) == counts(whole)
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        scores = [token for part in parts if part["logprobs"] for token in part["logprobs"]["content"]]
        assert is_close(scores, (choice["logprobs"] or {"content": []})["content"])


def counts(answer: dict[str, Any]) -> dict[str, Any]:
    """But for what was computed for somebody else before."""
    return {name: count for name, count in answer["usage"].items() if name != "prompt_tokens_details"}


def is_close(one: Any, other: Any) -> bool:
    """Equal but for what another batch's rounding does to a number."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < 1e-4
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_close, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_close(one[key], other[key]) for key in one)
    return bool(one == other)


@pytest.mark.parametrize("number", range(15))
def test_a_streamed_completion_adds_up_to_the_whole_one(server: Server, number: int) -> None:
    rng = random.Random(number)
    body = {"model": MODEL, "prompt": rng.choice(["ab", ["ab", "Größe"], [64, 65], [[64], [65, 66]]])}
    body |= {"max_tokens": 12, **random_parameters(rng), "echo": rng.random() < 0.5}
    if rng.random() < 0.5:
        body["logprobs"] = rng.randrange(3)
    whole = server.post("/v1/completions", **body).json()
    chunks = chunks_of(server.post("/v1/completions", **body, stream=True, stream_options={"include_usage": True}))
    assert counts(chunks[-1]) == counts(whole)
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset") if choice["logprobs"] else ():
            streamed = [value for part in parts if part["logprobs"] for value in part["logprobs"][name]]
            assert is_close(streamed, choice["logprobs"][name])


# --- Open WebUI; the numbers are those of what it was seen to do

TOOL = {
    "type": "function",
    "function": {
        "name": "get_current_timestamp",
        "description": "\n        Get the time.\n        ",
        "parameters": {"properties": {}, "type": "object"},
    },
}
TITLE = "### Task:\nGenerate a concise title.\n### Chat History:\n<chat_history>\nUSER: Hello\n</chat_history>"


def test_1_tools_with_every_message_do_not_fail_it(thinking_server: Server) -> None:
    tools = [{**TOOL, "function": {**TOOL["function"], "name": f"tool_{number}"}} for number in range(36)]
    answer = chat(thinking_server, tools=tools, stream=True)
    assert chunks_of(answer) and "x-ignored-fields" not in answer.headers


def test_2_a_title_asked_for_first_does_not_hold_up_the_chat(tiny_checkpoint: Path) -> None:
    limits = {"MAX_NUM_BATCHED_TOKENS": "32", "MAX_NUM_MIXED_TOKENS": "4", "MAX_NUM_SEQS": "3", "DTYPE": "float32"}
    done: list[str] = []
    with serve(MAIN, MODEL_PATH=str(tiny_checkpoint), **limits) as server:
        server.wait_until_healthy()

        def ask(name: str, content: str) -> None:
            messages = [{"role": "user", "content": content}]
            assert chat(server, messages=messages, max_tokens=1, ignore_eos=True).status_code == 200
            done.append(name)

        running = threading.Thread(target=chat, args=(server,), kwargs={"max_tokens": 300, "ignore_eos": True})
        title = threading.Thread(target=ask, args=("title", TITLE + "x" * 250))
        running.start()
        while server.get("/health").json()["running"] < 1:
            time.sleep(0.002)
        title.start()
        time.sleep(0.05)
        ask("chat", "Hello " + "x" * 200)
        title.join()
        running.join()
    assert done == ["chat", "title"]


def test_3_hanging_up_on_a_whole_answer_stops_it(server: Server) -> None:
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(
            server.url + "/v1/chat/completions",
            json={"model": MODEL, "messages": HELLO, "ignore_eos": True, "n": 8},
            timeout=0.4,
        )
    server.wait_until_idle(timeout=2)


def test_4_without_max_tokens_the_context_is_the_limit(server: Server) -> None:
    usage = chat(server, max_tokens=None, ignore_eos=True).json()["usage"]
    assert usage["total_tokens"] == 480


def test_5_and_6_fields_of_other_servers_and_numbers_of_either_kind_pass(server: Server) -> None:
    foreign = ["mirostat", "mirostat_eta", "repeat_last_n", "tfs_z", "repeat_penalty", "use_mmap", "think", "format"]
    foreign += ["num_keep", "num_ctx", "num_thread", "num_gpu", "foo"]
    controls = {"temperature": 1, "min_p": 0, "seed": 0, "stop": ["END", "\n\n"], "logit_bias": {"15": 5, "16": -100}}
    answer = chat(server, **dict.fromkeys(foreign, 1), **controls, reasoning_effort="high", frequency_penalty=1.1)
    assert answer.status_code == 200 and answer.headers["x-ignored-fields"] == ", ".join(sorted(foreign))


def test_7_a_task_takes_the_parameters_of_its_model(server: Server) -> None:
    task = [{"role": "system", "content": "S"}, {"role": "user", "content": TITLE}]
    answer = chat(server, messages=task, temperature=0.5, stop=["a\\nb"], max_tokens=50, stream=False).json()
    assert len(answer["choices"]) == 1 and isinstance(answer["choices"][0]["message"]["content"], str)


def test_8_models_are_listed_at_once_while_answers_are_computed(server: Server) -> None:
    running = threading.Thread(target=chat, args=(server,), kwargs={"max_tokens": 400, "ignore_eos": True, "n": 8})
    running.start()
    for _ in range(10):
        begin = time.monotonic()
        assert server.get("/v1/models").json()["data"][0]["id"] == MODEL
        assert time.monotonic() - begin < 5
    assert running.is_alive(), "the list waited for the answers"
    running.join()


def test_9_streams_say_what_they_are_and_usage_and_timings_come_at_the_end(server: Server) -> None:
    answer = chat(server, stream=True, stream_options={"include_usage": True}, ignore_eos=True)
    assert answer.headers["content-type"].startswith("text/event-stream") and "content-encoding" not in answer.headers
    *others, finish, usage = chunks_of(answer)
    for chunk in (finish, usage):
        timings = chunk["timings"]
        assert (timings["prompt_n"], timings["predicted_n"]) == (usage["usage"]["prompt_tokens"], 8)
        assert timings["predicted_per_second"] > 0 and timings["prompt_ms"] > 0
    assert all("timings" not in chunk for chunk in others)
    assert chunks_of(chat(server, stream=True))[-1]["timings"]["predicted_n"] > 0
    assert chat(server).json()["timings"]["prompt_n"] > 0


def test_10_no_key_says_error_or_is_null_where_that_is_read_as_one(server: Server) -> None:
    assert "error" not in chat(server).json()
    for chunk in chunks_of(chat(server, stream=True)):
        assert "error" not in chunk and chunk.get("timings", {}) is not None
        assert all(choice["delta"] is not None for choice in chunk["choices"])


def test_11_parts_of_text_pass_and_an_image_for_a_text_model_is_refused_by_name(server: Server) -> None:
    text = {"type": "text", "text": "What is this?"}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    assert chat(server, messages=[{"role": "user", "content": [text]}]).status_code == 200
    refusal = chat(server, messages=[{"role": "user", "content": [text, image]}])
    assert refusal.status_code == 400 and refusal.json()["error"]["param"] == "messages[0].content[1]"


def test_12_an_answer_is_continued_with_and_without_the_flags(server: Server) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Well, "}]
    flags = {"continue_final_message": True, "add_generation_prompt": False}
    plain, flagged = (chat(server, messages=begun, temperature=0, **f).json() for f in ({}, flags))
    assert plain["choices"] == flagged["choices"] and counts(plain) == counts(flagged)


def test_13_a_round_with_a_tool_is_answered(thinking_server: Server) -> None:
    call = {"id": "call_3f", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_3f", "content": "sunny in Paris"},
    ]
    assert chunks_of(chat(thinking_server, messages=messages, tools=[TOOL], stream=True))


def test_14_an_idle_connection_outlives_the_clients(server: Server) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    for pause in (0, 6):  # uvicorn's own limit is 5 s
        time.sleep(pause)
        connection.request("GET", "/v1/models")
        assert connection.getresponse().read()
        assert connection.sock is not None, "the server closed the connection"
        connection.auto_open = False
    connection.close()


def test_15_the_developer_speaks_as_the_system(server: Server) -> None:
    as_system, as_developer = (
        chat(server, messages=[{"role": role, "content": "S"}, *HELLO], temperature=0).json()
        for role in ("system", "developer")
    )
    assert as_system["choices"] == as_developer["choices"]


# --- the table of errors


def post(server: Server, content: bytes) -> httpx2.Response:
    headers = {"content-type": "application/json"}
    return httpx2.post(server.url + "/v1/chat/completions", content=content, headers=headers, timeout=30)


GOOD = '{"model": "Tiny-Qwen3", "messages": [{"role": "user", "content": "x"}], '
MISSING = "missing_required_parameter"


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ("{", None, None),
        ("[1]", None, None),
        ('"text"', None, None),
        ("", None, None),
        ("\udcff", None, None),
        ('{"messages": []}', "model", MISSING),
        ('{"model": "Tiny-Qwen3"}', "messages", MISSING),
        ('{"model": 5, "messages": []}', "model", "invalid_value"),
        (GOOD + '"messages": [{"role": "user", "content": [{}]}]}', "messages[0].content[0].type", MISSING),
        (GOOD + '"messages": [{"content": "x"}]}', "messages[0].role", MISSING),
        (GOOD + '"stop": [5]}', "stop[0]", "invalid_value"),
        (GOOD + '"n": 1.5}', "n", "invalid_value"),
        (GOOD + '"stream": "yes"}', "stream", "invalid_value"),
        (GOOD + '"stream_options": {"include_usage": 1}}', "stream_options.include_usage", "invalid_value"),
    ],
)
def test_a_bad_body_is_a_400_that_says_where(server: Server, body: str, param: str | None, code: str | None) -> None:
    refusal = post(server, body.encode(errors="surrogateescape"))
    assert refusal.status_code == 400 and refusal.headers["x-should-retry"] == "false"
    error = refusal.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ["a", None]}, "prompt[1]", ""),
        ({"prompt": ["a", 5]}, "prompt[1]", "string"),
        ({"prompt": [[1], "a"]}, "prompt[1]", ""),
        ({"prompt": [1, "a"]}, "prompt[1]", ""),
        ({"stop": ["a"] * 17}, "stop", "16 items"),
        ({"stop": ["a", "b" * 2000]}, "stop[1]", "1024 characters"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "100"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a", "integer"),
    ],
)
def test_where_a_field_has_several_types_the_one_that_was_meant_is_told(
    server: Server, fields: dict[str, Any], param: str, words: str
) -> None:
    error = server.post("/v1/completions", **{"model": MODEL, "prompt": "x", **fields}).json()["error"]
    assert error["param"] == param and words in error["message"]


def test_what_is_longer_than_any_context_is_refused_at_once(server: Server) -> None:
    before = processor_seconds(server)
    assert chat(server, messages=HELLO * 10_001).json()["error"]["param"] == "messages"
    tokens = server.post("/v1/completions", model=MODEL, prompt=[5] * 1_000_000).json()["error"]
    assert tokens["code"] == "context_length_exceeded" and processor_seconds(server) - before < 5


def test_fields_inside_of_others_are_refused_and_reported_too(server: Server) -> None:
    refusal = chat(server, messages=[*HELLO, {"role": "assistant", "audio": {"id": "x"}}]).json()["error"]
    assert (refusal["param"], refusal["code"]) == ("messages[1].audio", "unsupported_value")
    part = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
    answer = chat(server, messages=[{"role": "user", "content": [part]}], stream_options={"foo": 1}, größe=1)
    assert answer.headers["x-ignored-fields"] == (
        "gr\\u00f6\\u00dfe, messages[0].content[0].cache_control, stream_options.foo"
    )
    tokens = server.post("/tokenize", prompt="x", foo=1)
    assert tokens.status_code == 200 and tokens.headers["x-ignored-fields"] == "foo"


def test_an_empty_answer_has_empty_log_probabilities_if_they_were_asked_for(server: Server) -> None:
    ended = {"logit_bias": {"258": 100}}
    assert chat(server, **ended, logprobs=True).json()["choices"][0]["logprobs"]["content"] == []
    text = server.post("/v1/completions", model=MODEL, prompt="x", **ended, logprobs=0).json()["choices"][0]
    assert text["text"] == "" and text["logprobs"]["tokens"] == []


@pytest.mark.slow
def test_a_preempted_task_and_what_preempts_it_are_answered(tiny_checkpoint: Path) -> None:
    options = {"max_tokens": 380, "ignore_eos": True}
    with serve(
        MAIN, MODEL_PATH=str(tiny_checkpoint), DTYPE="float32", KV_CACHE_MEMORY="400KiB", MAX_MODEL_LEN="480"
    ) as server:
        server.wait_until_healthy()
        for length in (0, 4, 9, 13):
            statuses: list[int] = []

            def ask(content: str, statuses: list[int] = statuses) -> None:
                statuses.append(chat(server, messages=[{"role": "user", "content": content}], **options).status_code)

            task = threading.Thread(target=ask, args=("### Task: title",))
            task.start()
            time.sleep(0.05)
            ask("hello" + "y" * length)
            task.join()
            assert statuses == [200, 200]


def test_a_body_of_another_kind_is_a_400(server: Server) -> None:
    refusal = httpx2.post(server.url + "/v1/chat/completions", data={"model": MODEL})
    assert refusal.status_code == 400 and "application/json" in refusal.json()["error"]["message"]


def test_a_prompt_beyond_the_context_is_told_in_the_words_that_clients_look_for(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x" * 480}], max_tokens=10)
    assert refusal.value.code == "context_length_exceeded" and refusal.value.param == "messages"
    assert "maximum context length is 480 tokens. However, you requested" in str(refusal.value)
    assert "context_length_exceeded" in str(refusal.value)


@pytest.mark.parametrize("num_answers", [1, 3])
def test_an_answer_is_no_longer_than_the_context_leaves(server: Server, num_answers: int) -> None:
    """As agents ask, whose limit of an answer is a third of a large context whatever the prompt is."""
    prompt = "x" * 300
    body: dict[str, Any] = {"model": MODEL, "max_tokens": 480, "ignore_eos": True, "n": num_answers}
    for answer in (
        server.post("/v1/chat/completions", messages=[{"role": "user", "content": prompt}], **body),
        server.post("/v1/completions", prompt=prompt, **body),
        server.post("/v1/completions", prompt=prompt, best_of=num_answers + 1, **body),
    ):
        usage, choices = answer.json()["usage"], answer.json()["choices"]
        most = num_answers + ("best_of" in answer.request.content.decode())
        assert usage["completion_tokens"] == (480 - usage["prompt_tokens"]) * most
        assert [choice["finish_reason"] for choice in choices] == ["length"] * num_answers


def test_the_limit_of_a_response_is_told_by_its_own_name(server: Server) -> None:
    body: dict[str, Any] = {"model": MODEL, "input": "Hello", "ignore_eos": True}
    whole = server.post("/v1/responses", max_output_tokens=480, **body).json()
    assert whole["status"] == "incomplete" and whole["usage"]["total_tokens"] == 480
    for stream in (False, True):
        refusal = server.post("/v1/responses", max_output_tokens=481, stream=stream, **body)
        assert refusal.status_code == 400 and refusal.json()["error"]["param"] == "max_output_tokens"


def test_an_unsupported_value_is_told_by_its_field(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model=MODEL, messages=HELLO, audio={"voice": "alloy", "format": "wav"})
    assert (refusal.value.code, refusal.value.param) == ("unsupported_value", "audio")


def test_unknown_models_routes_and_methods_have_the_same_body(server: Server, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="nobody", prompt="x")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    for answer, status in (
        (server.get("/v1/nothing"), 404),
        (server.get("/v1/models/nobody"), 404),
        (server.get("/nothing"), 404),
        (server.get("/v1/chat/completions"), 405),
        (httpx2.put(server.url + "/health"), 405),
        (httpx2.delete(server.url + "/v1/models"), 405),
    ):
        assert answer.status_code == status and answer.headers["x-should-retry"] == "false"
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_too_large_is_a_413_however_it_is_sent(tiny_checkpoint: Path) -> None:
    with serve(MAIN, MODEL_PATH=str(tiny_checkpoint), MAX_BODY_SIZE="100KiB") as server:
        server.wait_until_healthy()
        large = b'{"prompt": "' + b"x" * 200_000
        headers = {"content-type": "application/json"}
        for content in (large, (large[i : i + 1000] for i in range(0, len(large), 1000))):
            refusal = httpx2.post(server.url + "/v1/completions", content=content, headers=headers)
            assert refusal.status_code == 413 and refusal.headers["x-request-id"]
            assert refusal.json()["error"]["type"] == "invalid_request_error"
            assert refusal.headers["x-should-retry"] == "false"
        within = server.post("/v1/completions", model=MODEL, prompt="x" * 90_000)
        assert within.json()["error"]["code"] == "context_length_exceeded"
    assert "Traceback" not in "".join(server.lines)


def test_a_full_queue_is_a_503_that_says_when_to_come_back(tiny_checkpoint: Path) -> None:
    with serve(MAIN, MODEL_PATH=str(tiny_checkpoint), MAX_NUM_SEQS="1", MAX_QUEUED_REQUESTS="1") as server:
        server.wait_until_healthy()
        options = {"max_tokens": 400, "ignore_eos": True}
        threads = [threading.Thread(target=chat, args=(server,), kwargs=options) for _ in range(2)]
        for thread in threads:
            thread.start()
        while (health := server.get("/health").json())["running"] + health["waiting"] < 2:
            time.sleep(0.002)
        for stream in (True, False):
            refusal = chat(server, stream=stream)
            assert refusal.status_code == 503 and int(refusal.headers["retry-after"]) >= 1
            error = refusal.json()["error"]
            assert (error["type"], error["code"]) == ("server_error", "server_is_overloaded")
            assert "x-should-retry" not in refusal.headers
        for thread in threads:
            thread.join()


def test_no_error_shows_the_inside(server: Server, tiny_checkpoint: Path) -> None:
    hostile = ["{", '{"model": "' + "x" * 9999 + '", "messages": [{"role": "user", "content": "x"}]}', "[" * 5000]
    hostile += ['{"model": "Tiny-Qwen3", "messages": ' + json.dumps([{"role": "user", "content": {"a": 1}}]) + "}"]
    for body in hostile:
        text = post(server, body.encode()).text
        assert not any(mark in text for mark in ("Traceback", ".py", " at 0x", str(tiny_checkpoint.parent)))
