"""An agent's conversation with a recurrent model, over HTTP: each turn computes only what is new."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from genuine_templates import source_of
from models import RECURRENT, byte_tokenizer
from process import MAIN, Server, serve

BLOCK = 16  # tokens
CITIES = ["Oslo", "Rome", "Bern", "Riga"]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": CITIES}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
        },
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen 3.5 with a token per byte, and the genuine template."""
    directory, tokenizer = tmp_path_factory.mktemp("qwen3_5"), byte_tokenizer(has_marks=True)
    tokenizer.chat_template = source_of("Qwen3.5-4B")
    model_class, config = RECURRENT["qwen3_5"]
    own = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 16384}
    model_class(type(config)(**{**config.to_dict(), **own})).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["8", "0"], ids=["guesses", "no guesses"])
def servers(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Server, Server]]:
    """With snapshots, and without."""
    options = {
        "MODEL_PATH": str(checkpoint),
        "DTYPE": "float32",
        "NUM_SPECULATIVE_TOKENS": request.param,
        "SERVED_MODEL_NAME": "m",
    }
    with serve(MAIN, **options) as one, serve(MAIN, **options, SNAPSHOT_MEMORY="1KiB") as other:
        for server in (one, other):
            server.wait_until_healthy()
        yield one, other


def ask(server: Server, messages: list[dict[str, Any]], **body: Any) -> dict[str, Any]:
    response = server.post(
        "/v1/chat/completions",
        model="m",
        messages=messages,
        temperature=0,
        max_tokens=120,
        chat_template_kwargs={"enable_thinking": False},
        **{"tools": [TOOL], "tool_choice": "required", **body},
    )
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_each_turn_computes_only_what_is_new_and_equals_the_same_turn_without_the_cache(
    servers: tuple[Server, Server],
) -> None:
    cached_server, plain_server = servers
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "Ask for one city after the other."},
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "How is the weather?"},
    ]
    known = 0
    for number in range(20):
        answer, plain = ask(cached_server, messages), ask(plain_server, messages)
        assert (
            answer["choices"][0]["message"]["tool_calls"][0]["function"]
            == (plain["choices"][0]["message"]["tool_calls"][0]["function"])
        )
        assert answer["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
        assert plain["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= known - BLOCK
        call = answer["choices"][0]["message"]["tool_calls"][0]
        # the answer's end is known, but for a block that was not full, and the marks that the template puts behind it
        known = answer["usage"]["total_tokens"] - 2
        messages += [
            answer["choices"][0]["message"],
            {"role": "tool", "tool_call_id": call["id"], "content": f"{number} degrees"},
        ]
    # the user's next turn: the template leaves the reasoning out of the answers since the last one
    last = ask(cached_server, [*messages[:3], {"role": "assistant", "content": "Fine."}, messages[2]])
    before = ask(cached_server, messages[:3])["usage"]["prompt_tokens"]
    header = len("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] >= before - header - BLOCK
