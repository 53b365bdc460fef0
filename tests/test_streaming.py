"""The streamer's text is the decoded text, whatever way it was cut; events are the bytes that clients rely on."""

import asyncio
import json
import random
from collections.abc import AsyncIterator

import pytest
from models import byte_tokenizer

from errors import Overloaded
from schemas import ChatCompletionChunk, ChunkChoice, Delta, Usage
from streaming import REPLACEMENT, ChunkWire, TextStreamer, collect_chat, sse

TOKENIZER = byte_tokenizer()
TEXTS = ["plain text", "日本語のテキスト", "😀👩‍👩‍👧‍👦🇫🇷", "naïve Ωμέγα\n\n한국어 text", "a" * 50]


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


def stream(token_ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    streamer = TextStreamer(TOKENIZER, stop)
    pieces = [streamer.put([token_id]) for token_id in token_ids]
    return [*pieces, streamer.end()]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_its_tokens(text: str) -> None:
    pieces = stream(ids(text))
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_a_character_comes_as_soon_as_it_is_whole(text: str) -> None:
    streamer = TextStreamer(TOKENIZER)
    shown = ""
    for character in text:
        shown += streamer.put(ids(character))
        assert shown == text[: len(shown)] and len(shown) >= len(text[: len(shown)])
    assert shown == text


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_never_become_replacement_characters(seed: int) -> None:
    rng = random.Random(seed)
    token_ids = [rng.randrange(len(TOKENIZER)) for _ in range(300)]
    whole = TOKENIZER.decode(token_ids, skip_special_tokens=True).replace(REPLACEMENT, "")
    pieces = stream(token_ids)
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) == whole


@pytest.mark.parametrize("num_bytes", range(1, 12))
def test_a_character_after_garbage_is_not_lost(num_bytes: int) -> None:
    assert "".join(stream([ids("你")[0]] * num_bytes + ids("你"))) == "你"


def test_an_answer_cut_inside_a_character_ends_before_it() -> None:
    assert "".join(stream(ids("ok 😀")[:-1])) == "ok "


@pytest.mark.parametrize("seed", range(50))
def test_stop_strings_are_cut_off_and_never_leak(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("ab日😀\n") for _ in range(40))
    stops = tuple("".join(rng.choice("ab日😀\n") for _ in range(rng.randrange(1, 5))) for _ in range(3))
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    expected = text
    if ends:  # the stop string that is complete first, and of those that end there the longest
        expected = min((text[:end] for end in [min(ends)]), key=len)
        expected = expected[: -max(len(stop) for stop in stops if expected.endswith(stop))]
    pieces = stream(ids(text), stops)
    assert "".join(pieces) == expected
    shown = ""
    for piece in pieces:
        shown += piece
        assert expected.startswith(shown)


def test_what_looks_like_a_stop_string_but_is_none_comes_in_the_end() -> None:
    assert stream(ids("one ST"), ("STOP",))[-1] == "ST"


def test_nothing_is_held_back_without_need() -> None:
    assert stream(ids("abSc"), ("STOP",))[:4] == ["a", "b", "", "Sc"]


def test_the_prefix_decides_how_the_first_token_reads() -> None:
    streamer = TextStreamer(TOKENIZER, prefix=ids("日")[:2])
    assert streamer.put(ids("日")[2:]) == "日"


def chunk(**delta: str) -> ChatCompletionChunk:
    return ChatCompletionChunk(
        id="chatcmpl-1", created=1, model="m", choices=[ChunkChoice(index=0, delta=Delta(**delta))]
    )


async def chunks(fail: bool = False) -> AsyncIterator[ChatCompletionChunk]:
    yield chunk(role="assistant", content="")
    yield chunk(content='say "hi"\n')
    if fail:
        raise Overloaded('no "room"\n')
    done = chunk()
    done.choices[0].finish_reason = "stop"
    yield done
    usage = Usage(prompt_tokens=3, completion_tokens=2, total_tokens=5)
    yield ChatCompletionChunk(id="chatcmpl-1", created=1, model="m", choices=[], usage=usage)


def events(include_usage: bool, fail: bool = False) -> list[str]:
    async def read() -> bytes:
        return b"".join([event async for event in sse(chunks(fail), ChunkWire(include_usage))])

    text = asyncio.run(read()).decode()
    assert text.endswith("\n\n")
    return text.split("\n\n")[:-1]


def test_a_stream_is_byte_for_byte_what_clients_expect() -> None:
    head = 'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":'
    assert events(include_usage=False) == [
        head + '[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}',
        head + '[{"index":0,"delta":{"content":"say \\"hi\\"\\n"},"logprobs":null,"finish_reason":null}]}',
        head + '[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}',
        "data: [DONE]",
    ]


def test_usage_comes_once_last_and_only_if_asked_for() -> None:
    *others, last, done = [json.loads(e[6:]) if "[DONE]" not in e else e for e in events(include_usage=True)]
    assert all(other["usage"] is None and other["choices"] for other in others)
    assert last["choices"] == [] and last["usage"]["total_tokens"] == 5 and done == "data: [DONE]"


def test_an_error_in_a_stream_is_its_last_event() -> None:
    last = events(include_usage=False, fail=True)[-1]
    assert json.loads(last[6:]) == {
        "error": {"message": 'no "room"\n', "type": "server_error", "param": None, "code": "server_is_overloaded"}
    }


def test_the_whole_answer_is_the_fold_of_the_stream() -> None:
    answer = asyncio.run(collect_chat(chunks()))
    assert answer.choices[0].message.content == 'say "hi"\n'
    assert answer.choices[0].finish_reason == "stop" and answer.usage.total_tokens == 5
