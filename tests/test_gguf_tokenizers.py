"""The tokenizer of a GGUF file gives the tokens of its model's own, or is refused by the name of what is unknown."""

import json
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import test_genuine_prompts
from gguf_twins import KEYS, LLAMA, LLAMA_, LLAMA_TWIN, TWINS, factors, twin
from transformers import AutoTokenizer

from checkpoints import (
    conversion,
    gguf_header,
    gguf_tokenizer,
)


def tokenizer(path: Path, **keys: Any) -> Any:
    """keys: of the tokenizer; `__` is a point."""
    own = {f"tokenizer.{key.replace('__', '.')}": value for key, value in keys.items()}
    LLAMA_TWIN.write(path, tokenizer={**gguf_files.TOKENIZER, **own})
    conversion.convert([path], path.with_suffix(""), lambda fraction: None)
    return AutoTokenizer.from_pretrained(path.with_suffix(""))


def test_control_tokens_outside_ascii_stay_whole(tmp_path: Path) -> None:
    """DeepSeek's, say."""
    tokens, kinds = list(gguf_files.TOKENS), list(gguf_files.TOKENIZER["tokenizer.ggml.token_type"])
    tokens[-3:-1], kinds[-2] = ["<｜begin▁of▁sentence｜>", "<｜User｜>"], 4
    found = tokenizer(
        tmp_path / "tiny.gguf",
        ggml__tokens=tokens,
        ggml__token_type=kinds,
        ggml__bos_token_id=gguf_files.VOCAB - 3,
        ggml__add_bos_token=True,
    )
    ids = found.encode("a<｜User｜>b<｜begin▁of▁sentence｜>")
    assert found.convert_ids_to_tokens(ids) == [
        "<｜begin▁of▁sentence｜>",
        "a",
        "<｜User｜>",
        "b",
        "<｜begin▁of▁sentence｜>",
    ]
    assert ids[0] == gguf_files.VOCAB - 3 and ids[2] == gguf_files.VOCAB - 2 and len(found) == gguf_files.VOCAB
    assert found.decode(ids, skip_special_tokens=True) == "a<｜User｜>b"
    assert found.bos_token == "<｜begin▁of▁sentence｜>"


SENTENCEPIECE = {
    "ggml__model": "llama",
    "ggml__pre": None,
    "ggml__merges": None,
    "ggml__tokens": ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(253)), "▁", "a", "b", "▁a", "▁b"],
    "ggml__scores": [0.0] * 256 + [-1.0, -2.0, -3.0, -4.0, -5.0],
    "ggml__token_type": [2, 3, 3] + [6] * 253 + [1] * 5,
    "ggml__bos_token_id": 1,
    "ggml__eos_token_id": 2,
    "ggml__unknown_token_id": 0,
}


@pytest.mark.parametrize(("prefix", "first"), [(None, "▁a"), (True, "▁a"), (False, "a")])
def test_a_space_before_the_text_is_added_where_the_file_says_so(
    prefix: bool | None, first: str, tmp_path: Path
) -> None:
    found = tokenizer(tmp_path / "tiny.gguf", **SENTENCEPIECE, ggml__add_space_prefix=prefix)
    ids = found.encode("a b")
    assert found.convert_ids_to_tokens(ids) == ["<s>", first, "▁b"]
    assert found.decode(ids, skip_special_tokens=True) == "a b"


def test_a_sentencepiece_tokenizer_without_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks the key tokenizer\.ggml\.scores"):
        tokenizer(tmp_path / "tiny.gguf", **{**SENTENCEPIECE, "ggml__scores": None})


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "in 2026's", ["in", "Ġ2026", "'s"]),
        ("smollm", "in 2026", ["in", "Ġ", "2", "0", "2", "6"]),
        ("qwen2", "in 2026", ["in", "Ġ", "2", "0", "2", "6"]),
        ("llama-bpe", "in 2026", ["in", "Ġ", "202", "6"]),
        ("deepseek-v3", "in 2026", ["in", "Ġ", "202", "6"]),
        ("default", "in 2026!", ["in", "Ġ", "202", "6", "!"]),
    ],
)
def test_text_is_split_as_the_file_says(pre: str, text: str, words: list[str], tmp_path: Path) -> None:
    found = tokenizer(tmp_path / "tiny.gguf", ggml__pre=pre)
    split = found.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [word for word, _ in split] == words


@pytest.mark.parametrize("pre", sorted(gguf_tokenizer.COMPOSED))
def test_letters_and_their_accents_are_composed_where_the_familys_own_tokenizer_does(pre: str, tmp_path: Path) -> None:
    found = tokenizer(tmp_path / "tiny.gguf", ggml__pre=pre)
    assert found("cafe\u0301").input_ids == found("caf\u00e9").input_ids
    assert tokenizer(tmp_path / "tiny.gguf", ggml__pre="llama-bpe")("e\u0301").input_ids != found("\u00e9").input_ids


@pytest.mark.parametrize("said", [None, "default"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen2", ["in", "Ġ", "2", "0", "2", "6", "!?"]),
        ("qwen3moe", ["in", "Ġ", "2", "0", "2", "6", "!?"]),
        ("starcoder2", ["in", "Ġ", "2", "0", "2", "6", "!?"]),
        ("gpt2", ["in", "Ġ2026", "!?"]),
        ("llama", ["in", "Ġ", "202", "6", "!?"]),
    ],
)
def test_text_is_split_as_the_family_does_where_the_file_does_not_say(
    name: str, words: list[str], said: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    TWINS[name].write(path, tokenizer={**gguf_files.TOKENIZER, "tokenizer.ggml.pre": said})
    found = gguf_tokenizer.load(path, gguf_header.read(path))
    split = found.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 2026!?")
    assert [word for word, _ in split] == words


@pytest.mark.parametrize(("name", "is_told"), [("llama", True), ("qwen2", False)])
def test_a_way_to_split_text_that_nobody_says_is_told(
    name: str, is_told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    TWINS[name].write(tmp_path / "tiny.gguf", tokenizer={**gguf_files.TOKENIZER, "tokenizer.ggml.pre": None})
    conversion.check_header([tmp_path / "tiny.gguf"])
    assert ("lacks the key tokenizer.ggml.pre" in caplog.text) == is_told


def test_an_unknown_way_to_split_text_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre is no-such, which is an unknown way to split text"):
        tokenizer(tmp_path / "tiny.gguf", ggml__pre="no-such")


@pytest.mark.parametrize(
    ("pre", "said", "adds"),
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("qwen2", None, False), ("qwen2", True, True)],
)
def test_a_text_begins_as_the_file_says_or_as_its_kind_does(
    pre: str, said: bool | None, adds: bool, tmp_path: Path
) -> None:
    bos = gguf_files.VOCAB - 3
    found = tokenizer(tmp_path / "tiny.gguf", ggml__pre=pre, ggml__bos_token_id=bos, ggml__add_bos_token=said)
    assert (found.encode("ab")[0] == bos) == adds


def test_several_templates_are_kept_by_name(tmp_path: Path) -> None:
    found = tokenizer(
        tmp_path / "tiny.gguf",
        chat_template="plain",
        chat_template__tool_use="with tools",
        chat_templates=["tool_use"],
    )
    assert found.chat_template == {"default": "plain", "tool_use": "with tools"}
    assert found.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "plain"


def test_all_tokens_that_end_a_turn_do(tmp_path: Path) -> None:
    end = gguf_files.VOCAB - 1
    tokenizer(tmp_path / "tiny.gguf", ggml__eot_token_id=end - 1, ggml__eom_token_id=end)
    generation = json.loads((tmp_path / "tiny" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [end, end - 1, end - 2]  # the last one is <|endoftext|>


# --- tokens that a file marks or names wrongly


def ends_of(path: Path, **keys: Any) -> tuple[Any, Any]:
    """Returns a file's tokenizer and the tokens that end its answers."""
    found = tokenizer(path, **keys)
    config = json.loads((path.with_suffix("") / "config.json").read_text())
    ids = config["eos_token_id"]
    return found, found.convert_ids_to_tokens([ids] if isinstance(ids, int) else ids or [])


@pytest.mark.parametrize("kind", [1, 4])
def test_an_end_that_is_not_marked_as_control_is_one_token_that_no_text_shows(kind: int, tmp_path: Path) -> None:
    kinds = [1] * (gguf_files.VOCAB - 3) + [3, 3, kind]
    found, ends = ends_of(tmp_path / "tiny.gguf", ggml__token_type=kinds, ggml__eos_token_id=gguf_files.VOCAB - 3)
    assert ends == ["<|endoftext|>", "<|im_end|>"]
    ids = found.encode("a<|im_end|>b")
    assert ids[1] == gguf_files.VOCAB - 1 and found.decode(ids, skip_special_tokens=True) == "ab"


def test_an_end_is_found_by_its_text_where_the_file_names_none(tmp_path: Path) -> None:
    found, ends = ends_of(tmp_path / "tiny.gguf", ggml__eos_token_id=None)
    assert ends == ["<|endoftext|>", "<|im_end|>"] and found.eos_token == "<|endoftext|>"


def test_a_sentencepiece_vocabulary_without_ids_has_those_of_llama(tmp_path: Path) -> None:
    said = {**SENTENCEPIECE, "ggml__bos_token_id": None, "ggml__eos_token_id": None, "ggml__unknown_token_id": None}
    kinds = [2, 1, 1] + [6] * 253 + [1] * 5  # and neither is marked
    found, ends = ends_of(tmp_path / "tiny.gguf", **{**said, "ggml__token_type": kinds})
    assert ends == ["</s>"] and found.eos_token == "</s>" and found.bos_token == "<s>"
    ids = found.encode("a</s>")
    assert ids[0] == 1 and ids[-1] == 2 and found.decode(ids, skip_special_tokens=True) == "a"


@pytest.mark.parametrize(("kind", "is_end"), [(1, False), (3, True), (4, False)])
def test_a_closing_tag_ends_an_answer_only_where_it_is_marked_or_nothing_else_does(
    kind: int, is_end: bool, tmp_path: Path
) -> None:
    """It is an HTML tag in the vocabularies of Qwen and Gemma."""
    tokens = [*gguf_files.TOKENS[:-4], "</s>", *gguf_files.SPECIAL]
    kinds = [1] * (len(tokens) - 4) + [kind] + [3] * 3
    said = {"ggml__tokens": tokens, "ggml__token_type": kinds, "ggml__merges": ["a b"]}
    found, ends = ends_of(tmp_path / "tiny.gguf", **said)
    assert ("</s>" in ends) == is_end
    assert ("</s>" in found.decode([tokens.index("</s>")], skip_special_tokens=True)) != is_end


def test_what_a_file_marks_wrongly_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kinds = [1] * (gguf_files.VOCAB - 3) + [3, 3, 1]
    LLAMA_TWIN.write(tmp_path / "t.gguf", tokenizer={**gguf_files.TOKENIZER, "tokenizer.ggml.token_type": kinds})
    conversion.check_header([tmp_path / "t.gguf"])
    assert "it does not mark <|im_end|> as control tokens, which end answers" in caplog.text


def test_the_sampling_that_a_file_recommends_is_the_models(tmp_path: Path) -> None:
    said = {"general.sampling.temp": 0.25, "general.sampling.top_k": 20, "general.sampling.min_p": 0.125}
    twin(LLAMA_, LLAMA, None, said).write(tmp_path / "tiny.gguf")
    conversion.convert([tmp_path / "tiny.gguf"], tmp_path / "tiny", lambda fraction: None)
    generation = json.loads((tmp_path / "tiny" / "generation_config.json").read_text())
    assert [generation[name] for name in ("temperature", "top_k", "min_p", "do_sample")] == [0.25, 20, 0.125, True]


TEXTS = [
    " What is 世界?\n\n  In 2026, don't  pay $12,345.67 — ok?\t\tnaïve café Ω≈ç🙂",
    "cafe\u0301 A\u030angstro\u0308m \u1112\u1161\u11ab",  # letters and their accents apart
    "def f(x):\n    return x ** 2  # 二乗\r\n\r\nHELLOworld camelCaseWord it's IT'S 1234567",
]


@pytest.mark.thinned(6)
@pytest.mark.parametrize(
    ("name", "architecture", "pre"),
    [
        ("qwen2_5", "qwen2", "qwen2"),
        ("llama3_2", "llama", "llama-bpe"),
        ("llama3_2", "llama", None),
        ("deepseek_v3", "llama", "deepseek-v3"),
        ("mistral_nemo", "llama", "tekken"),
        ("qwen3", "qwen3moe", "qwen2"),
    ],
)
def test_a_genuine_tokenizer_is_the_same_from_a_gguf_file(
    name: str, architecture: str, pre: str | None, tmp_path: Path
) -> None:
    genuine = AutoTokenizer.from_pretrained(test_genuine_prompts.fetch(name))
    state = json.loads(genuine.backend_tokenizer.to_str())
    tokens = [token for token, _ in sorted(genuine.get_vocab().items(), key=lambda pair: pair[1])]
    kinds = [1] * len(tokens)
    for added in state["added_tokens"]:
        kinds[added["id"]] = 3 if added["special"] else 4
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    own = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges}
    own |= {"bos_token_id": genuine.bos_token_id, "eos_token_id": genuine.eos_token_id}
    own |= {"add_bos_token": genuine("").input_ids == [genuine.bos_token_id]} if pre else {}
    path = tmp_path / "tiny.gguf"
    said = {f"tokenizer.ggml.{key}": value for key, value in own.items()}
    tensors = {f"blk.{layer}.attn_norm.weight": factors([1.0]) for layer in range(2)}
    gguf_files.write(path, architecture, {**KEYS, **LLAMA[1]}, tensors, said)
    read = gguf_tokenizer.load(path, gguf_header.read(path))
    specials = [added["content"] for added in state["added_tokens"]][:30]
    for text in (*TEXTS, "a".join(specials)):
        assert read(text).input_ids == genuine(text).input_ids
        assert read.decode(read(text).input_ids) == genuine.decode(genuine(text).input_ids)
