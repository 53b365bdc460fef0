"""Function calling as OpenAI's guide of 2023 showed it, with the SDK of that year: call, run, answer."""

import json

from process import Server
from test_samples import run

ASKS = """
import json
import openai

openai.api_base, openai.api_key = {address!r}, "unused"
functions = [
    {{
        "name": "get_current_weather",
        "description": "Get the current weather in a given location",
        "parameters": {{
            "type": "object",
            "properties": {{
                "location": {{"type": "string", "description": "The city and state, e.g. San Francisco, CA"}},
                "unit": {{"type": "string", "enum": ["celsius", "fahrenheit"]}},
            }},
            "required": ["location"],
        }},
    }}
]
messages = [{{"role": "user", "content": "What's the weather like in Boston?"}}]
body = dict(model="qwen2.5-coder-0.5b", messages=messages, functions=functions, temperature=0)
forced = dict(body, function_call={{"name": "get_current_weather"}})
"""

WHOLE = """
response = openai.ChatCompletion.create(**forced)
message, reason = response["choices"][0]["message"], response["choices"][0]["finish_reason"]
assert message.get("function_call") and message["content"] is None and reason == "function_call"
arguments = json.loads(message["function_call"]["arguments"])
messages += [message, {"role": "function", "name": message["function_call"]["name"], "content": '{"temperature": 22}'}]
second = openai.ChatCompletion.create(**body, function_call="none", max_tokens=40)
print(json.dumps([arguments, second["choices"][0]["message"]["content"], second["choices"][0]["finish_reason"]]))
"""

STREAMED = """
name, arguments, reason = "", "", None
for chunk in openai.ChatCompletion.create(**forced, stream=True):
    choice = chunk["choices"][0]
    if choice["delta"].get("function_call"):
        name += choice["delta"]["function_call"].get("name", "")
        arguments += choice["delta"]["function_call"].get("arguments", "")
    reason = choice["finish_reason"] or reason
print(json.dumps([name, json.loads(arguments), reason]))
"""


def test_the_guide_of_2023_runs_to_its_end(server: Server, legacy_python: str) -> None:
    asks = ASKS.format(address=server.url + "/v1")
    arguments, text, reason = json.loads(run(legacy_python, "-c", asks + WHOLE))
    assert "Boston" in arguments["location"] and text.strip() and reason in ("stop", "length")
    name, streamed, last = json.loads(run(legacy_python, "-c", asks + STREAMED))
    assert (name, streamed, last) == ("get_current_weather", arguments, "function_call")
