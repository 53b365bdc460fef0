"""The streamer's text is the decoded text, whatever way it was cut; events are the bytes that clients rely on."""

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Collection

import pytest
from models import byte_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from api.streaming import ChunkEncoder, collect_chat
from errors import Overloaded
from schemas import ChatCompletionChunk, ChunkChoice, Delta, Usage
from server.events import sse
from text.detokenizer import REPLACEMENT, StopFinder, TextDecoder
from text.logprobs import _BYTES, TokenTexts

TOKENIZER = byte_tokenizer()
TEXTS = ["plain text", "日本語のテキスト", "😀👩‍👩‍👧‍👦🇫🇷", "naïve Ωμέγα\n\n한국어 text", "a" * 50]


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


def stream(token_ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    decoder, stops = TextDecoder(TOKENIZER), StopFinder(stop)
    pieces = [stops.put(decoder.put(token_id)) for token_id in token_ids]
    rest = stops.put(decoder.end())
    return [*pieces, rest if stops.is_stopped else rest + stops.end()]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_its_tokens(text: str) -> None:
    pieces = stream(ids(text))
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_a_character_comes_as_soon_as_it_is_whole(text: str) -> None:
    decoder = TextDecoder(TOKENIZER)
    shown = ""
    for character in text:
        shown += "".join(map(decoder.put, ids(character)))
        assert shown == text[: len(shown)] and len(shown) >= len(text[: len(shown)])
    assert shown == text


def with_byte_fallback(strips: bool) -> PreTrainedTokenizerFast:
    """As Llama 2 has it, which takes off the first space, or Gemma: some pieces, and a token for each byte."""
    pieces = ["\u2581", "\u2581a", "\u2581the", "b", "é", "世", REPLACEMENT, "\u2581\u2581", "\n"]
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", *names, *pieces])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if strips else [])])
    tokenizer.add_special_tokens(["<eos>", "<pad>"])
    tokenizer.add_tokens(["<mark>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)


ALPHABET = {data[0]: character for character, data in _BYTES.items()}
MARKED_BYTES = byte_tokenizer(has_marks=True)
LLAMA, GEMMA = with_byte_fallback(strips=True), with_byte_fallback(strips=False)
TOKENIZERS = {"bytes": MARKED_BYTES, "llama": LLAMA, "gemma": GEMMA}
BYTES = {name: TokenTexts(tokenizer).byte_ids for name, tokenizer in TOKENIZERS.items()}
FALLBACK = ["llama", "gemma"]


def random_tokens(rng: random.Random, tokenizer: PreTrainedTokenizerFast, byte_ids: Collection[int]) -> list[int]:
    """Characters in bytes, whole and broken, bytes at random, and all the other tokens."""
    found: list[int] = []
    while len(found) < 60:
        text = rng.choice(["a", "é", "世", "😀", "\n", "世é😀"]).encode()
        data = [text, text[: rng.randrange(1, 5)], text[1:], rng.randbytes(rng.randrange(1, 4))][rng.randrange(4)]
        tokens = [f"<0x{byte:02X}>" for byte in data] if byte_ids else [ALPHABET[byte] for byte in data]
        others = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(1, 4))]
        found += rng.choice([tokenizer.convert_tokens_to_ids(tokens), others])
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_stream_is_what_the_tokenizer_decodes(name: str) -> None:
    """Bytes that never become a character among them, and those that are still to become one are not shown."""
    tokenizer, byte_ids = TOKENIZERS[name], BYTES[name]
    for seed in range(300):
        token_ids = random_tokens(random.Random(seed), tokenizer, byte_ids)
        decoder, shown = TextDecoder(tokenizer.backend_tokenizer, byte_ids=byte_ids), ""
        whole = tokenizer.decode(token_ids, skip_special_tokens=True)
        for token_id in token_ids:
            shown += decoder.put(token_id)
            assert whole.startswith(shown)
        assert shown + decoder.end() == whole


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_and_lone_spaces_take_no_space_away(name: str) -> None:
    tokenizer, byte_ids = TOKENIZERS[name], BYTES[name]
    words = ["\u2581", "\u2581the"] if name in FALLBACK else ["\u0120", "t"]
    space, word, special = *tokenizer.convert_tokens_to_ids(words), tokenizer.all_special_ids[0]
    for token_ids in itertools.product([space, word, special], repeat=5):
        decoder = TextDecoder(tokenizer.backend_tokenizer, byte_ids=byte_ids)
        shown = "".join(map(decoder.put, token_ids)) + decoder.end()
        assert shown == tokenizer.decode(token_ids, skip_special_tokens=True), token_ids


@pytest.mark.parametrize("name", FALLBACK)
def test_a_run_of_bytes_comes_with_what_follows_it(name: str) -> None:
    """Before that each of its bytes may yet be no character's."""
    tokenizer, byte_ids = TOKENIZERS[name], BYTES[name]
    smile = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "😀\n".encode()]
    word = tokenizer.convert_tokens_to_ids("\u2581the")
    decoder = TextDecoder(tokenizer, byte_ids=byte_ids)
    assert [decoder.put(token_id) for token_id in [word, *smile, word, word]][6:] == ["😀\n the", " the"]
    assert "".join(map(decoder.put, smile[:4] * 40)).startswith("😀" * 16)


@pytest.mark.parametrize("num_bytes", range(1, 12))
def test_a_character_after_garbage_is_not_lost(num_bytes: int) -> None:
    assert "".join(stream([ids("你")[0]] * num_bytes + ids("你"))) == REPLACEMENT * num_bytes + "你"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_replacement_character_that_a_model_writes_holds_nothing_back(name: str) -> None:
    tokenizer, byte_ids = TOKENIZERS[name], BYTES[name]
    own = ids(REPLACEMENT) if name == "bytes" else [tokenizer.convert_tokens_to_ids(REPLACEMENT)]
    after = ids("a")[0] if name == "bytes" else tokenizer.convert_tokens_to_ids("b")
    decoder = TextDecoder(tokenizer, byte_ids=byte_ids)
    pieces = [decoder.put(token_id) for token_id in [after, *own, after, after]]
    assert "".join(pieces[:-1]) == tokenizer.decode([after, *own, after]) and len(pieces[-1]) == 1


def test_an_answer_cut_inside_a_character_ends_as_the_tokenizer_reads_it() -> None:
    assert stream(ids("ok 😀")[:-1]) == ["o", "k", " ", "", "", "", REPLACEMENT]


def test_hours_of_garbage_take_no_longer_than_text() -> None:
    """A forced token whose byte is no character's."""
    begin, number = time.process_time(), ids("你")[0]
    assert "".join(stream([number] * 20_000)) == REPLACEMENT * 20_000
    assert time.process_time() - begin < 10


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
    decoder = TextDecoder(TOKENIZER, prefix=ids("日")[:2])
    assert decoder.put(ids("日")[2]) == "日"


def test_the_prefixes_own_broken_end_is_not_the_answers() -> None:
    decoder = TextDecoder(TOKENIZER, prefix=ids("日")[:2])
    assert "".join(map(decoder.put, ids("abé"))) + decoder.end() == "abé"


@pytest.mark.parametrize("seed", range(50))
def test_a_stop_string_that_comes_too_early_stays_and_later_ones_end(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("aab") for _ in range(30))
    stops, num_free = ("aa", "xaab", "ba")[: rng.randrange(1, 4)], rng.randrange(len(text))
    ends = [at + len(stop) for stop in stops for at in range(len(text)) if text.startswith(stop, at)]
    late = min([end for end in ends if end > num_free], default=None)
    finder = StopFinder(stops)
    shown = "".join(finder.put(character, number >= num_free) for number, character in enumerate(text))
    if late is None:
        assert shown + finder.end() == text
    else:
        cut = text[:late]
        assert shown == cut[: -max(len(stop) for stop in stops if cut.endswith(stop))]


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
        return b"".join([event async for event in sse(chunks(fail), ChunkEncoder(include_usage))])

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
