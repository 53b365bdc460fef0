"""The effect of every honoured field: a function per field, for every request that has it, asked of a real server."""

import inspect
import json
import math
import re
import sys
from collections.abc import Callable
from typing import Any

from models import byte_tokenizer
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from process import Server, until

from api.responses.requests import ResponsesRequest
from schemas import ChatCompletionRequest, CompletionRequest

MODEL = "Tiny-Qwen3"
HELLO = [{"role": "user", "content": "Hello"}]
REQUESTS: dict[str, Any] = {
    "chat/completions": (ChatCompletionRequest, chat_create_params, {"messages": HELLO}),
    "completions": (CompletionRequest, completion_create_params, {"prompt": "Hello"}),
    "responses": (ResponsesRequest, response_create_params, {"input": "Hello"}),
}
TOOL = {"type": "function", "function": {"name": "f"}}
A, B = 64, 65  # token ids of "a" and "b"


def ask(server: Server, path: str, **body: Any) -> Any:
    """An answer that is the same each time, unless the body says otherwise."""
    length = "max_output_tokens" if path == "responses" else "max_tokens"
    start = {"model": MODEL, length: 24, "temperature": 0, "ignore_eos": True, **REQUESTS[path][2]}
    return server.post(f"/v1/{path}", **{name: value for name, value in {**start, **body}.items() if value != "unset"})


def texts(server: Server, path: str, **body: Any) -> list[str]:
    answer = ask(server, path, **body)
    assert answer.status_code == 200, answer.text
    if path == "responses":
        return [answer.json()["output"][0]["content"][0]["text"]]
    return [c["text"] if path == "completions" else c["message"]["content"] for c in answer.json()["choices"]]


def num_tokens(server: Server, path: str, **body: Any) -> int:
    usage = ask(server, path, **body).json()["usage"]
    return int(usage["output_tokens" if path == "responses" else "completion_tokens"])


def temperature(server: Server, path: str) -> None:
    assert len({texts(server, path, temperature=2, seed=seed)[0] for seed in range(4)}) == 4
    assert len({texts(server, path, temperature=0, seed=seed)[0] for seed in range(4)}) == 1


def top_p(server: Server, path: str) -> None:
    assert texts(server, path, temperature=2, top_p=1e-9) == texts(server, path)
    assert texts(server, path, temperature=2, top_p=0) == texts(server, path)


def top_k(server: Server, path: str) -> None:
    assert texts(server, path, temperature=2, top_k=1) == texts(server, path)
    assert texts(server, path, temperature=2, top_k=-1, seed=1) == texts(server, path, temperature=2, seed=1)


def min_p(server: Server, path: str) -> None:
    assert texts(server, path, temperature=2, min_p=1) == texts(server, path)


def seed(server: Server, path: str) -> None:
    assert texts(server, path, temperature=2, seed=3) == texts(server, path, temperature=2, seed=3)


def timeout(server: Server, path: str) -> None:
    late = ask(server, path, timeout=1e-6)
    assert late.status_code == 504 and late.json()["error"]["code"] == "request_timeout"
    assert texts(server, path, timeout=60) == texts(server, path)


def keep_alive(server: Server, path: str) -> None:
    def expires_at() -> str:
        return str(server.get("/api/ps").json()["models"][0]["expires_at"])

    texts(server, path, keep_alive="10m")
    assert expires_at() < "2200"
    texts(server, path, keep_alive=-1)
    assert expires_at().startswith("2200")
    assert ask(server, path, keep_alive="soon").status_code == 400


def presence_penalty(server: Server, path: str) -> None:
    assert texts(server, path, presence_penalty=2) != texts(server, path, presence_penalty=-2)


def frequency_penalty(server: Server, path: str) -> None:
    bias = {A: 100, B: 80}  # after ten more of them than of "b", "a" is no longer the best
    assert set(texts(server, path, logit_bias=bias)[0]) == {"a"}
    assert set(texts(server, path, logit_bias=bias, frequency_penalty=2)[0]) == {"a", "b"}


def repetition_penalty(server: Server, path: str) -> None:
    assert texts(server, path, repetition_penalty=1.5) != texts(server, path)


def logit_bias(server: Server, path: str) -> None:
    assert texts(server, path, logit_bias={str(A): 100}) == ["a" * 24]
    assert "a" not in texts(server, path, logit_bias={A: -100})[0]


def stop(server: Server, path: str) -> None:
    whole = texts(server, path)[0]
    assert texts(server, path, stop=whole[5]) == texts(server, path, stop=["never", whole[5]])
    assert texts(server, path, stop=whole[5])[0] == whole[: whole.index(whole[5])]


def stop_token_ids(server: Server, path: str) -> None:
    assert texts(server, path, logit_bias={A: 100}, stop_token_ids=[B, A]) == [""]
    assert num_tokens(server, path, logit_bias={A: 100}, stop_token_ids=[A]) == 1


def ignore_eos(server: Server, path: str) -> None:
    eos = byte_tokenizer().eos_token_id
    assert num_tokens(server, path, logit_bias={eos: 100}, ignore_eos=False) == 1
    assert num_tokens(server, path, logit_bias={eos: 100}, ignore_eos=True) == 24


def min_tokens(server: Server, path: str) -> None:
    eos = byte_tokenizer().eos_token_id
    assert num_tokens(server, path, logit_bias={eos: 100}, ignore_eos=False, min_tokens=5) == 6


def max_tokens(server: Server, path: str) -> None:
    assert num_tokens(server, path, max_tokens=7) == 7


def max_completion_tokens(server: Server, path: str) -> None:
    assert num_tokens(server, path, max_completion_tokens=7, max_tokens=9) == 7


def max_output_tokens(server: Server, path: str) -> None:
    answer = ask(server, path, max_output_tokens=7).json()
    assert answer["usage"]["output_tokens"] == 7 and answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}


def n(server: Server, path: str) -> None:
    answers = texts(server, path, n=3, temperature=2, seed=1)
    assert len(set(answers)) == 3 and answers == texts(server, path, n=3, temperature=2, seed=1)
    assert answers[0] == texts(server, path, temperature=2, seed=1)[0]


def model(server: Server, path: str) -> None:
    assert texts(server, path, model="tiny-qwen3") == texts(server, path)
    assert ask(server, path, model="other").status_code == 404


def stream(server: Server, path: str) -> None:
    assert ask(server, path, stream=True).headers["content-type"].startswith("text/event-stream")
    assert ask(server, path, stream=False).headers["content-type"] == "application/json"


def stream_options(server: Server, path: str) -> None:
    events = ask(server, path, stream=True, stream_options={"include_usage": True}).text.split("\n\n")
    assert '"completion_tokens":24' in events[-3] and '"choices":[]' in events[-3]
    assert "usage" not in ask(server, path, stream=True).text


def messages(server: Server, path: str) -> None:
    other = [{"role": "system", "content": "S"}, *HELLO]
    assert texts(server, path, messages=other) != texts(server, path)


def prompt(server: Server, path: str) -> None:
    assert texts(server, path, prompt="Other") != texts(server, path)


def input(server: Server, path: str) -> None:
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "Hel"}, {"type": "input_text", "text": "lo"}]}]
    assert texts(server, path, input=parts) == texts(server, path) == texts(server, "chat/completions")


def instructions(server: Server, path: str) -> None:
    chat = texts(server, "chat/completions", messages=[{"role": "system", "content": "S"}, *HELLO])
    assert texts(server, path, instructions="S") == chat != texts(server, path)


def previous_response_id(server: Server, path: str) -> None:
    first = ask(server, path, max_output_tokens=6, ignore_eos=True).json()
    said = [{"role": "user", "content": "Hello"}, *first["output"], {"role": "user", "content": "Again"}]
    chained = texts(server, path, input="Again", previous_response_id=first["id"])
    assert chained == texts(server, path, input=said) != texts(server, path, input="Again")
    unknown = ask(server, path, previous_response_id="resp_0")
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "previous_response_not_found"


def store(server: Server, path: str) -> None:
    for value, status in ((None, 200), (True, 200), (False, 404)):
        answer = ask(server, path, store=value, max_output_tokens=2).json()
        assert answer["store"] is (status == 200)
        assert server.get(f"/v1/responses/{answer['id']}").status_code == status


def background(server: Server, path: str) -> None:
    answer = ask(server, path, background=True).json()
    assert answer["status"] == "queued" and answer["background"] is True and answer["output"] == []
    until(lambda: server.get(f"/v1/responses/{answer['id']}").json()["status"] == "incomplete")
    (item,) = server.get(f"/v1/responses/{answer['id']}").json()["output"]
    assert [item["content"][0]["text"]] == texts(server, path, background=False)
    refusal = ask(server, path, background=True, store=False)
    assert refusal.status_code == 400 and refusal.json()["error"]["param"] == "background"


def truncation(server: Server, path: str) -> None:
    long = [{"role": "user", "content": character * 150} for character in "abcd"]
    assert ask(server, path, input=long, truncation="disabled").status_code == 400
    assert texts(server, path, input=long, truncation="auto") == texts(server, path, input=long[2:])
    assert texts(server, path, truncation="auto") == texts(server, path)


def logprobs(server: Server, path: str) -> None:
    """Their values are compared with transformers' elsewhere."""
    key, value = ("token_logprobs", 0) if path == "completions" else ("content", True)
    assert len(ask(server, path, logprobs=value).json()["choices"][0]["logprobs"][key]) == 24
    assert ask(server, path).json()["choices"][0]["logprobs"] is None


def top_logprobs(server: Server, path: str) -> None:
    if path == "responses":
        [token, *_] = ask(server, path, top_logprobs=3).json()["output"][0]["content"][0]["logprobs"]
    else:
        [token, *_] = ask(server, path, logprobs=True, top_logprobs=3).json()["choices"][0]["logprobs"]["content"]
    assert len(token["top_logprobs"]) == 3 and token["top_logprobs"][0]["logprob"] == token["logprob"]


def include(server: Server, path: str) -> None:
    part = ask(server, path, include=["message.output_text.logprobs"]).json()["output"][0]["content"][0]
    assert len(part["logprobs"]) == 24 and part["logprobs"][0]["top_logprobs"] == []


SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}


def is_structured(server: Server, path: str, **body: Any) -> bool:
    """For some answers, one of them cut short."""
    length = "max_output_tokens" if path == "responses" else "max_tokens"
    for seed in range(3):
        (answer,) = texts(server, path, temperature=1, seed=seed, **{length: 200}, **body)
        assert json.loads(answer) in ({"n": 1}, {"n": 2})
    (short,) = texts(server, path, **{length: 3}, **body)
    return short.startswith("{")


def text(server: Server, path: str) -> None:
    assert ask(server, path, text={"format": {"type": "text"}, "verbosity": "medium"}).status_code == 200
    assert is_structured(server, path, text={"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}})
    assert (
        json.loads(texts(server, path, text={"format": {"type": "json_object"}}, max_output_tokens=400)[0]) is not None
    )


def response_format(server: Server, path: str) -> None:
    assert texts(server, path, response_format={"type": "text"}) == texts(server, path)
    schema = {"name": "x", "schema": SCHEMA, "strict": True}
    assert is_structured(server, path, response_format={"type": "json_schema", "json_schema": schema})
    answer = ask(server, path, response_format={"type": "json_object"}, max_tokens=3).json()["choices"][0]
    assert answer["message"]["content"].startswith("{") and answer["finish_reason"] == "length"
    for bad in ({}, {"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": 5}}):
        refusal = ask(server, path, response_format=bad)
        assert refusal.status_code == 400 and refusal.json()["error"]["param"].startswith("response_format")


def guided_json(server: Server, path: str) -> None:
    assert is_structured(server, path, guided_json=SCHEMA) and is_structured(
        server, path, guided_json=json.dumps(SCHEMA)
    )
    for bad in ({"type": "foo"}, {"$ref": "http://127.0.0.1:9/x"}, {"$ref": "#"}, "no json", "[" * 100_000):
        refusal = ask(server, path, guided_json=bad)
        assert refusal.status_code == 400 and refusal.json()["error"]["param"] == "guided_json"


def guided_regex(server: Server, path: str) -> None:
    assert re.fullmatch("[xy]{4}", texts(server, path, guided_regex="[xy]{4}", temperature=1)[0])
    assert ask(server, path, guided_regex="([").json()["error"]["param"] == "guided_regex"


def guided_choice(server: Server, path: str) -> None:
    assert texts(server, path, guided_choice=["left", "right"], temperature=2)[0] in ("left", "right")
    assert texts(server, path, guided_choice=["a\x7fb"]) == ["a\x7fb"]
    assert ask(server, path, guided_choice=[]).json()["error"]["param"] == "guided_choice"


def guided_grammar(server: Server, path: str) -> None:
    assert texts(server, path, guided_grammar='start: "a" "b"') == ["ab"]
    for bad in ("start: nothing", "\u7c0f+\u00cf", "root ::= (", ""):
        refusal = ask(server, path, guided_grammar=bad)
        assert refusal.status_code == 400 and refusal.json()["error"]["param"] == "guided_grammar", bad


def structured_outputs(server: Server, path: str) -> None:
    assert texts(server, path, structured_outputs={"choice": ["left"], "json": None}) == ["left"]
    two = ask(server, path, structured_outputs={"choice": ["left"], "regex": "x"})
    assert two.status_code == 400 and two.json()["error"]["param"] == "structured_outputs.regex"
    unknown = ask(server, path, structured_outputs={"xml": "x"})
    assert unknown.json()["error"]["param"] == "structured_outputs.xml"


def echo(server: Server, path: str) -> None:
    assert texts(server, path, echo=True) == ["Hello" + texts(server, path)[0]]


def best_of(server: Server, path: str) -> None:
    options: dict[str, Any] = {"temperature": 1, "seed": 4, "logprobs": 0}
    tries = ask(server, path, n=5, **options).json()["choices"]
    means = {c["text"]: math.fsum(c["logprobs"]["token_logprobs"]) / 24 for c in tries}
    best = ask(server, path, n=2, best_of=5, **options).json()
    assert [c["text"] for c in best["choices"]] == sorted(means, key=lambda text: -means[text])[:2]
    assert [c["index"] for c in best["choices"]] == [0, 1] and best["usage"]["completion_tokens"] == 120
    hidden = ask(server, path, n=2, best_of=5, **{**options, "logprobs": None}).json()["choices"]
    assert [c["text"] for c in hidden] == [c["text"] for c in best["choices"]]
    assert hidden[0]["logprobs"] is None


def suffix(server: Server, path: str) -> None:
    """Of this model; the demo model has the format."""
    refusal = ask(server, path, suffix="x")
    assert refusal.status_code == 400 and refusal.json()["error"]["param"] == "suffix"
    assert texts(server, path, suffix="") == texts(server, path)


def continue_final_message(server: Server, path: str) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Well"}]
    assert texts(server, path, messages=begun, continue_final_message=True) == texts(server, path, messages=begun)
    assert texts(server, path, messages=begun, continue_final_message=False) != texts(server, path, messages=begun)


def add_generation_prompt(server: Server, path: str) -> None:
    with_prompt = ask(server, path, add_generation_prompt=True).json()["usage"]["prompt_tokens"]
    without = ask(server, path, add_generation_prompt=False).json()["usage"]["prompt_tokens"]
    assert with_prompt - without == len("assistant\n") + 1  # a token per byte, and the turn's own


WEATHER = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]},
}
WEATHER["parameters"]["additionalProperties"] = False


def offered(path: str) -> list[dict[str, Any]]:
    return [{"type": "function", **(WEATHER if path == "responses" else {"function": WEATHER})}]


def calls(server: Server, path: str, **body: Any) -> list[str]:
    """The arguments of each call, for an answer with room for several."""
    length = "max_output_tokens" if path == "responses" else "max_tokens"
    answer = ask(
        server, path, **{"tools": offered(path), "ignore_eos": False, "enable_thinking": False, length: 300, **body}
    ).json()
    if path == "responses":
        return [item["arguments"] for item in answer["output"] if item["type"] == "function_call"]
    return [call["function"]["arguments"] for call in answer["choices"][0]["message"].get("tool_calls", ())]


def tools(thinking_server: Server, path: str) -> None:
    """How they are called is tested elsewhere."""
    assert prompt_tokens(thinking_server, path, tools=offered(path)) > prompt_tokens(thinking_server, path) + 100
    assert texts(thinking_server, path, tools=[]) == texts(thinking_server, path)
    nameless = "tools[0].name" if path == "responses" else "tools[0].function"
    for bad, field in (({"type": 5}, "tools[0].type"), ({"type": "function"}, nameless)):
        refusal = ask(thinking_server, path, tools=[bad])
        assert refusal.status_code == 400 and refusal.json()["error"]["param"].startswith(field)
    refusal = ask(thinking_server, path, tools=offered(path) * 2)
    assert refusal.status_code == 400 and refusal.json()["error"]["param"] == "tools"


def tool_choice(thinking_server: Server, path: str) -> None:
    named = {"type": "function", "name": "weather"}
    named = named if path == "responses" else {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        found = calls(thinking_server, path, tool_choice=choice, temperature=1, seed=1)
        assert found and all(json.loads(arguments)["city"] in ("Rome", "Oslo") for arguments in found)
    assert len(found) == 1  # a function that is named is called once
    assert texts(thinking_server, path, tools=offered(path), tool_choice="none") == texts(thinking_server, path)
    for bad in ("some", {"type": "function", "function": {"name": "other"}}, {"type": "custom"}, {}):
        refusal = ask(thinking_server, path, tools=offered(path), tool_choice=bad)
        assert refusal.status_code == 400 and refusal.json()["error"]["param"] == "tool_choice"
    assert ask(thinking_server, path, tool_choice="required").json()["error"]["param"] == "tool_choice"


def parallel_tool_calls(thinking_server: Server, path: str) -> None:
    options = {"tool_choice": "required", "temperature": 1}
    several = [len(calls(thinking_server, path, seed=seed, **options)) for seed in range(6)]
    assert max(several) > 1
    one = [len(calls(thinking_server, path, seed=seed, parallel_tool_calls=False, **options)) for seed in range(6)]
    assert one == [1] * 6


def functions(thinking_server: Server, path: str) -> None:
    """A view of tools; how their calls come back is tested elsewhere."""
    as_tools = prompt_tokens(thinking_server, path, tools=offered(path))
    assert prompt_tokens(thinking_server, path, functions=[WEATHER]) == as_tools
    assert texts(thinking_server, path, functions=[]) == texts(thinking_server, path)


def function_call(thinking_server: Server, path: str) -> None:
    body: dict[str, Any] = {"functions": [WEATHER], "ignore_eos": False, "enable_thinking": False, "max_tokens": 300}
    answer = ask(thinking_server, path, function_call={"name": "weather"}, **body).json()["choices"][0]
    assert json.loads(answer["message"]["function_call"]["arguments"])["city"] in ("Rome", "Oslo")
    assert texts(thinking_server, path, functions=[WEATHER], function_call="none") == texts(thinking_server, path)


def prompt_tokens(server: Server, path: str, **body: Any) -> int:
    usage = ask(server, path, **body).json()["usage"]
    return int(usage["input_tokens" if path == "responses" else "prompt_tokens"])


def does_not_think(server: Server, path: str, **body: Any) -> bool:
    """The template says so: the thinking is over before it has begun."""
    return prompt_tokens(server, path, **body) - prompt_tokens(server, path) == 6


def enable_thinking(thinking_server: Server, path: str) -> None:
    assert does_not_think(thinking_server, path, enable_thinking=False)
    assert texts(thinking_server, path, enable_thinking=True) == texts(thinking_server, path)


def chat_template_kwargs(thinking_server: Server, path: str) -> None:
    for name in ("enable_thinking", "thinking"):
        assert does_not_think(thinking_server, path, chat_template_kwargs={name: False})
        assert not does_not_think(thinking_server, path, chat_template_kwargs={name: False}, enable_thinking=True)
    assert does_not_think(thinking_server, path, chat_template_kwargs={"reasoning_effort": "none"})
    answer = ask(thinking_server, path, chat_template_kwargs={"enable_thinking": True, "bos_token": "x"})
    assert answer.headers["x-ignored-fields"] == "chat_template_kwargs.bos_token"


def reasoning_effort(thinking_server: Server, path: str) -> None:
    assert does_not_think(thinking_server, path, reasoning_effort="none")
    assert texts(thinking_server, path, reasoning_effort="high") == texts(thinking_server, path)
    assert not does_not_think(thinking_server, path, reasoning_effort="none", enable_thinking=True)


def reasoning(thinking_server: Server, path: str) -> None:
    assert does_not_think(thinking_server, path, reasoning={"effort": "none", "summary": "auto"})
    assert texts(thinking_server, path, reasoning={"effort": "low"}) == texts(thinking_server, path)


def thinking_token_budget(thinking_server: Server, path: str) -> None:
    """For a model that would think on and on."""
    think = byte_tokenizer(has_marks=True).convert_tokens_to_ids("<think>")
    for budget in (0, 5):
        usage = ask(thinking_server, path, logit_bias={think: 100}, thinking_token_budget=budget).json()["usage"]
        details = usage["output_tokens_details" if path == "responses" else "completion_tokens_details"]
        assert details["reasoning_tokens"] == 1 + budget + len("\n") + 1
    whole = ask(thinking_server, path, logit_bias={think: 100}).json()["usage"]
    assert whole["output_tokens_details" if path == "responses" else "completion_tokens_details"] == {
        "reasoning_tokens": 24
    }


EFFECTS: dict[str, Callable[..., None]] = {  # on a model that may think, or the other
    name: function
    for name, function in inspect.getmembers(sys.modules[__name__], inspect.isfunction)
    if list(inspect.signature(function).parameters) in (["server", "path"], ["thinking_server", "path"])
}
