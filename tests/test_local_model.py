"""The local provider: names, defaults, and choices that run side by side."""

import asyncio
import random
import threading
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from models import byte_tokenizer

from api.streaming import collect_chat, collect_completion
from config import Settings
from engine.sampling_params import SampledToken, SamplingParams
from engine.sequence import TokenOutput
from errors import ModelLoading, ModelNotFound, Overloaded
from providers.router import ProviderRouter
from schemas import ChatCompletionRequest, CompletionRequest
from serving.chat import with_marks
from serving.chat_models import ChatModels
from serving.generation import GenerationRequest, OutputDelta, generate, merge
from serving.loading import load, sampling_defaults
from serving.local import LocalModel
from text.answer_parser import ParserOptions
from text.detokenizer import MarkingDetokenizer
from text.logprobs import TokenTexts
from text.reasoning_format import THINK

HELLO = [{"role": "user", "content": "Hello"}]


def provider(**settings: Any) -> LocalModel:
    return ChatModels(Settings.model_validate(settings), load).first


def test_the_served_name_is_the_base_name_or_what_is_set_and_all_names_work_in_any_case() -> None:
    plain = provider(model_path="/models/Org/Qwen3-0.6B/")
    assert plain.entry.id == "Qwen3-0.6B"
    named = provider(model_path="google/gemma-3-27b-it", served_model_name="my/model")
    assert named.entry.id == named.entry.root == "my/model"
    for name in ("my/model", "MY/Model", "google/gemma-3-27b-it", "gemma-3-27b-it"):
        assert named.serves(name)
    assert not named.serves("gemma")


def test_requests_before_the_model_is_ready_are_told_so_and_unknown_models_are_not_found(tiny_checkpoint: Path) -> None:
    early = provider(model_path=str(tiny_checkpoint), model_load_wait=0)
    for model, error in ((early.name, ModelLoading), ("y", ModelNotFound)):
        request = ChatCompletionRequest.model_validate({"model": model, "messages": HELLO, "stream": True})
        with pytest.raises(error):
            asyncio.run(anext(early.stream_chat(request)))


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, {"temperature": 0.7, "top_p": 1.0}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, {"temperature": 0.6, "top_p": 1.0, "top_k": 20}),
        ({"repetition_penalty": 1.1}, {"temperature": 0.7, "top_p": 1.0, "repetition_penalty": 1.1}),
        ({"do_sample": False, "temperature": 0.1}, {"temperature": 0.7, "top_p": 1.0}),
    ],
)
def test_the_models_recommendation_goes_before_the_specifications(
    own: dict[str, object], expected: dict[str, object]
) -> None:
    assert sampling_defaults(SimpleNamespace(**own)) == expected


def test_the_prefix_decides_who_answers_unless_the_name_is_a_model_here() -> None:
    router = ProviderRouter(Settings(_env_file=None), lambda name: name in ("mine", "openai/mine"))
    owners = {
        "openai/gpt-4": ("openai", "gpt-4"),
        "ollama/org/name:tag": ("ollama", "org/name:tag"),
        "minimax/x": ("minimax", "x"),
        "gpt-4": ("openai", "gpt-4"),
        "o3-mini": ("openai", "o3-mini"),
        "models/embedding-001": ("gemini", "models/embedding-001"),
    }
    for model, (owner, name) in owners.items():
        found = router.provider_of(model)
        assert found is not None and (found[0], found[2]) == (owner, name)
    for model in ("mine", "openai/mine", "huggingface/a/b", "sentence-transformers/a", "qwen", "other/x", ""):
        assert router.provider_of(model) is None


class Groups:
    """An engine whose tokens arrive in groups, as they do when the caller is sometimes slow."""

    def __init__(self, groups: list[list[TokenOutput]]) -> None:
        self.groups = groups

    async def stream(self, *request: Any, **more: Any) -> AsyncGenerator[list[TokenOutput]]:
        for group in self.groups:
            yield group


MARKED = byte_tokenizer(has_marks=True)
MARKS = {mark: chr(0x10FF00 + number) for number, mark in enumerate(("<think>", "</think>", "<tool_call>"))}
THINKING = ParserOptions(think=THINK.marked(MARKS), marks={own: mark for mark, own in MARKS.items()})


def deltas_of(groups: list[list[TokenOutput]], request: GenerationRequest) -> list[OutputDelta]:
    marking = MarkingDetokenizer(MARKED, {MARKED.convert_tokens_to_ids(mark): own for mark, own in MARKS.items()})
    template = SimpleNamespace(detokenizer=MARKED, marking_detokenizer=marking)
    loaded = cast(Any, SimpleNamespace(engine=Groups(groups), template=template, texts=TokenTexts(MARKED)))

    async def gather() -> list[OutputDelta]:
        return [delta async for delta in generate(loaded, 0, request)]

    return asyncio.run(gather())


def answered(groups: list[list[TokenOutput]], stop: str) -> tuple[str, list[int], list[int], int]:
    """Text, tokens, their offsets, and how many were counted."""
    deltas = deltas_of(groups, GenerationRequest([1], SamplingParams(99), [stop]))
    tokens = [token.token_id for delta in deltas for token in delta.tokens]
    text = "".join(delta.text for delta in deltas)
    return text, tokens, [offset for delta in deltas for offset in delta.offsets], deltas[-1].num_tokens


def outputs_of(text: str) -> list[TokenOutput]:
    token_ids = MARKED(text, add_special_tokens=False).input_ids
    return [*(TokenOutput(i, sampled=SampledToken(i, -1.0)) for i in token_ids), TokenOutput(None, "stop")]


def said(text: str, *stops: str, is_open: bool = False, min_tokens: int = 0) -> tuple[str, str, str | None]:
    """Thoughts, content and finish reason of an answer, the same however its tokens are grouped."""
    options, params = replace(THINKING, is_thinking=is_open), SamplingParams(99, min_tokens=min_tokens)
    outputs, found = outputs_of(text), set()
    for size in (1, 2, 5, len(outputs)):
        groups = [outputs[at : at + size] for at in range(0, len(outputs), size)]
        deltas = deltas_of(
            groups, GenerationRequest([1], params, with_marks(list(stops), MARKS), parser_options=options)
        )
        parts = [part for delta in deltas for part in delta.parts]
        thoughts, content = "".join(part.reasoning for part in parts), "".join(part.content for part in parts)
        found.add((thoughts, content, deltas[-1].finish_reason))
    (one,) = found
    return one


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("stop", ["END", "\n\n", "b END"])
def test_a_stop_string_ends_the_content_alone(stop: str, is_open: bool) -> None:
    begin = "" if is_open else "\n\n<think>"
    text = begin + f"a{stop}b END\n\nc</think>d{stop}e"
    assert said(text, stop, is_open=is_open) == (f"a{stop}b END\n\nc", "d", "stop")
    assert said(f"d{stop}e", stop) == ("", "d", "stop")
    assert said(f"{begin}a</think>d", stop, is_open=is_open) == ("a", "d", "stop")
    assert said(begin + "a" + stop[:-1], stop, is_open=is_open)[0].startswith("a" + stop[:-1].rstrip())


@pytest.mark.parametrize("stop", ["\n", "\n\n", " "])
def test_blanks_around_thoughts_are_no_content_that_a_stop_string_ends(stop: str) -> None:
    assert said(f"\n\n<think>\na\n</think>\n\n \nb{stop}c", stop) == ("a", "b", "stop")
    assert said(f"a</think> \n\n{stop}b{stop}c", stop, is_open=True) == ("a", "b", "stop")
    assert said(f"<think>a</think>{stop}", stop) == ("a", "", "stop")


def test_a_stop_string_may_be_the_end_of_the_thoughts_or_a_blank_before_content() -> None:
    assert said("<think>a</think>b", "</think>") == ("a", "", "stop")
    assert said("<think>a</think>\n\nb", "</think>\n") == ("a", "", "stop")
    assert said("\n\nb", "\n\n") == ("", "", "stop")
    assert said("\n", "\n\n") == ("", "\n", "stop")


@pytest.mark.parametrize(("min_tokens", "content"), [(0, "ab"), (4, "ab"), (5, "ab..c"), (7, "ab..c"), (8, "ab..c..d")])
def test_a_stop_string_waits_for_min_tokens(min_tokens: int, content: str) -> None:
    """A token per character; one that came too early stays, and a later one ends the answer."""
    assert said("ab..c..d", "..", min_tokens=min_tokens)[1] == content


@pytest.mark.parametrize("seed", range(40))
def test_how_tokens_are_grouped_does_not_matter_to_an_answer(seed: int) -> None:
    """Bytes that are no character, and a stop string that comes, comes nearly, or does not."""
    rng = random.Random(seed)
    tokenizer = byte_tokenizer()
    letters = tokenizer("aab世é", add_special_tokens=False).input_ids
    token_ids = [rng.choice(letters) for _ in range(30)]
    outputs = [TokenOutput(token_id, sampled=SampledToken(token_id, -1.0)) for token_id in token_ids]
    outputs.append(TokenOutput(None, "stop"))
    stop = rng.choice(["aab", "b世", "zz"])
    expected = answered([[output] for output in outputs], stop)
    for _ in range(5):
        cuts = sorted(rng.sample(range(1, len(outputs)), 6))
        groups = [outputs[i:j] for i, j in zip([0, *cuts], [*cuts, len(outputs)], strict=True)]
        assert answered(groups, stop) == expected
    assert expected[1] == token_ids[: len(expected[1])]
    if stop == "zz":
        assert expected[1] == token_ids


def test_seeded_choices_share_no_seed_with_those_of_another_seed_and_the_first_has_the_requests_own() -> None:
    choices = {
        (seed, number): GenerationRequest([1], SamplingParams(9, seed=seed), []).of_choice(number).params.seed
        for seed in range(-40, 40)
        for number in range(40)
    }
    assert len(set(choices.values())) == len(choices)
    assert all(choices[seed, 0] == seed for seed in range(-40, 40))
    assert GenerationRequest([1], SamplingParams(9), []).of_choice(3).params.seed is None


def test_seeded_answers_are_independent_and_repeatable_over_choices_and_prompts(tiny_checkpoint: Path) -> None:
    subject = provider(model_path=str(tiny_checkpoint), max_model_len=256, dtype="float32")
    question: dict[str, Any] = {"model": subject.name, "max_tokens": 12, "temperature": 1.5, "ignore_eos": True}

    async def texts(**body: Any) -> list[str]:
        request = CompletionRequest.model_validate(question | body)
        return [choice.text for choice in (await collect_completion(subject.stream_completion(request))).choices]

    async def main() -> None:
        many = [await texts(prompt="ab", seed=seed, n=4) for seed in range(5)]
        assert len({text for own in many for text in own}) == 20
        assert many[2] == await texts(prompt="ab", seed=2, n=4) and many[2][:1] == await texts(prompt="ab", seed=2)
        both = await texts(prompt=["ab", "cd", "ab"], seed=2, n=2)
        assert both[:2] == many[2][:2] and both[2:4] == await texts(prompt="cd", seed=2, n=2)
        assert len(set(both)) == 6
        best = await texts(prompt=["ab", "ab"], seed=2, best_of=4)
        assert best[0] in many[2] and best[1] not in many[2]
        await subject.unload()

    asyncio.run(main())


class Source:
    """Yields `count` deltas, then fails if told so; knows whether it was closed."""

    def __init__(self, index: int, count: int, fails: bool = False) -> None:
        self.index, self.count, self.fails, self.is_closed = index, count, fails, False

    async def deltas(self) -> AsyncGenerator[OutputDelta]:
        try:
            for number in range(self.count):
                await asyncio.sleep(0)
                yield OutputDelta(self.index, "x", number)
            if self.fails:
                raise ValueError("broken")
        finally:
            self.is_closed = True


@pytest.mark.parametrize("num_sources", [1, 5])
def test_merged_choices_come_whole_and_in_their_own_order(num_sources: int) -> None:
    async def main() -> list[OutputDelta]:
        return [delta async for delta in merge([Source(index, 20).deltas() for index in range(num_sources)])]

    deltas = asyncio.run(main())
    for index in range(num_sources):
        assert [delta.num_tokens for delta in deltas if delta.index == index] == list(range(20))


@pytest.mark.parametrize("num_sources", [1, 5])
def test_leaving_merged_choices_or_an_error_in_one_closes_all(num_sources: int) -> None:
    async def main() -> None:
        sources = [Source(index, 1000) for index in range(num_sources)]
        merged = merge([source.deltas() for source in sources])
        await anext(merged)
        await merged.aclose()
        assert sources[0].is_closed and not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        sources = [Source(index, 1000 * (index > 0), fails=index == 0) for index in range(num_sources)]
        with pytest.raises(ValueError, match="broken"):
            async for _ in merge([source.deltas() for source in sources]):
                pass
        assert sources[0].is_closed and len(asyncio.all_tasks()) == 1

    asyncio.run(main())


@pytest.mark.parametrize(("keys", "most"), [("", 12), ("a:one,a:two", 12), ("a:one,b:two", 9), ("a:1,b:2,c:3", 8)])
def test_each_key_has_places_of_its_own(tiny_checkpoint: Path, keys: str, most: int) -> None:
    settings = {"max_queued_requests": 10, "max_num_seqs": 2, "dtype": "float32", "api_keys": keys}
    subject = provider(model_path=str(tiny_checkpoint), **settings)
    engine = load(subject.path, subject.settings, subject.progress).engine
    assert engine.admission.max_sequences == most


def test_choices_whose_prompts_are_more_than_may_wait_begin_together_or_not_at_all(tiny_checkpoint: Path) -> None:
    settings = {"model_path": str(tiny_checkpoint), "max_model_len": 256, "dtype": "float32", "max_num_seqs": 1}
    subject = provider(**settings, max_queued_tokens=40)
    question: dict[str, Any] = {"model": subject.name, "max_tokens": 3, "n": 4}
    chat = ChatCompletionRequest.model_validate(question | {"messages": HELLO})
    completion = CompletionRequest.model_validate(question | {"prompt": ["x" * 30, "y" * 30]})

    async def main() -> None:
        engine = (await subject.wait()).engine
        assert len((await collect_chat(subject.stream_chat(chat))).choices) == 4
        assert len((await collect_completion(subject.stream_completion(completion))).choices) == 8
        hold = threading.Event()
        engine.post(hold.wait)
        other = asyncio.ensure_future(anext(engine.stream([1] * 30, SamplingParams(max_tokens=1, ignore_eos=True))))
        while not engine.num_waiting:
            await asyncio.sleep(0)
        for answering in (subject.stream_chat(chat), subject.stream_completion(completion)):
            with pytest.raises(Overloaded):
                await anext(answering)
            assert engine.num_waiting == 1
        hold.set()
        assert await other
        await subject.unload()

    asyncio.run(main())
