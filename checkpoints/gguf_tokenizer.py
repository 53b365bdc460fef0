"""The tokenizer of a GGUF file: what transformers makes of it, with what it leaves out.

A key that it does not know, or a way to split text that nobody here knows, refuses the file by its name.

Source: llama.cpp's llama-vocab.cpp, for what a key means and what holds where it is missing.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints import gguf_header
from checkpoints.gguf_header import Array, Header

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # kinds of vocabularies
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens

PREFIX = "tokenizer."
TEMPLATE = "tokenizer.chat_template"
HONOURED = {
    *("ggml.model", "ggml.pre", "ggml.tokens", "ggml.token_type", "ggml.scores", "ggml.merges"),
    *("ggml.bos_token_id", "ggml.eos_token_id", "ggml.eot_token_id", "ggml.eom_token_id"),
    "ggml.eos_token_ids",
    *("ggml.unknown_token_id", "ggml.padding_token_id", "ggml.add_bos_token", "ggml.add_eos_token"),
    *("ggml.add_space_prefix", "chat_template", "chat_templates"),
}
NO_EFFECT = {  # on a text's tokens in these kinds of vocabularies
    *("ggml.token_type_count", "ggml.seperator_token_id", "ggml.cls_token_id", "ggml.mask_token_id"),
    *("ggml.add_sep_token", "ggml.remove_extra_whitespaces", "ggml.precompiled_charsmap"),
    *("ggml.add_padding_token", "ggml.add_unknown_token"),  # as Ollama writes for each special token
    "huggingface.json",  # the whole tokenizer in another format, which llama.cpp does not read either
    *("ggml.prefix_token_id", "ggml.suffix_token_id", "ggml.middle_token_id"),
    *(f"ggml.fim_{part}_token_id" for part in ("pre", "suf", "mid", "pad", "rep", "sep")),
}

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SINGLE_DIGITS = (r"\p{N}", GPT2_WORDS)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# tokenizer.ggml.pre -> expressions, each of which cuts what the ones before left
SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "roberta-bpe", "mellum"), (GPT2_WORDS,)),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "minerva-7b"), SINGLE_DIGITS),
    **dict.fromkeys(("stablelm2", "hunyuan", "solar-open"), QWEN2),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
UNSAID = "default"  # tokenizer.ggml.pre before May 2024, where there is none, and where a converter knew no better
FAMILY_SPLITS = {  # how all models of an architecture split text; `default` is wrong for them
    **dict.fromkeys(("qwen2", "qwen2moe", "qwen3", "qwen3moe"), "qwen2"),
    **{"gpt2": "gpt-2", "starcoder2": "starcoder"},
}
VOCABULARY_SPLITS = {("llama", 128256): "llama-bpe"}  # architecture and number of tokens: Llama 3
# What splits so reads a letter and its accent as one character first, which files do not say: transformers' classes do
COMPOSED = {"qwen2", "qwen35", "command-r", "olmo", "mpt"}
WHOLE_WORDS = {  # what splits so takes a word of the vocabulary as it is, and begins each text with a token
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    "tekken",
}


def check(header: Header, known_splits: "set[str] | None" = None) -> None:
    """Raises ValueError with a sentence. known_splits: those of transformers; None where it is not at hand."""
    values = header.values
    kind = values.get("tokenizer.ggml.model")
    if kind not in (BYTE_LEVEL, SENTENCEPIECE):
        said = (
            "it has no tokenizer" if kind in (None, "none", "no_vocab") else f"its key tokenizer.ggml.model is {kind}"
        )
        raise ValueError(f"{said}; {BYTE_LEVEL} and {SENTENCEPIECE} are supported")
    wanted = "scores" if kind == SENTENCEPIECE and "tokenizer.ggml.merges" not in values else "merges"
    for key in ("tokens", "token_type", *((wanted,) if kind == BYTE_LEVEL or wanted == "scores" else ())):
        if not isinstance(values.get(f"tokenizer.ggml.{key}"), Array):
            raise ValueError(f"its tokenizer is incomplete: it lacks the key tokenizer.ggml.{key}")
    for key in values:
        name = key.removeprefix(PREFIX)
        if key.startswith(PREFIX) and name not in HONOURED | NO_EFFECT and not key.startswith(f"{TEMPLATE}."):
            raise ValueError(f"its key {key} is not supported")
    if kind == BYTE_LEVEL and known_splits is not None and (pre := _pre(header)) not in known_splits | SPLITS.keys():
        raise ValueError(f"its key tokenizer.ggml.pre is {pre}, which is an unknown way to split text")


def _pre(header: Header) -> str:
    """How the file says that text is split, or its family; llama.cpp takes `default` where the key is missing, and
    says that answers will be worse."""
    said = str(header.values.get("tokenizer.ggml.pre", UNSAID))
    return said if said != UNSAID else _family_split(header) or UNSAID


def _family_split(header: Header) -> str | None:
    architecture, tokens = str(header.values.get("general.architecture")), header.values.get("tokenizer.ggml.tokens")
    number = tokens.length if isinstance(tokens, Array) else 0
    return VOCABULARY_SPLITS.get((architecture, number)) or FAMILY_SPLITS.get(architecture)


def warning(header: Header) -> str | None:
    """What to tell of a file that does not say how text is split, where its family does not either."""
    is_byte_level = header.values.get("tokenizer.ggml.model") == BYTE_LEVEL
    if not is_byte_level or "tokenizer.ggml.pre" in header.values or _family_split(header):
        return None
    return (
        "it lacks the key tokenizer.ggml.pre, so text is split by llama.cpp's default, which may not "
        "be how the model was trained: a file by a newer converter may answer better"
    )


def load(gguf: Path, header: Header) -> "PreTrainedTokenizerFast":
    """Raises ValueError with a sentence, or whatever transformers raises."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import gguf_tokenizer_mapping as transformers_tokenizers

    check(header, set(transformers_tokenizers.GGUF_PRE_TOKENIZER_SPLITS))
    architecture, parts, said = transformers_tokenizers.get_gguf_tokenizer(str(gguf))
    if header.values["tokenizer.ggml.model"] == BYTE_LEVEL:
        parts["pre_tokenizer_type"] = _pre(header)
    backend, _ = transformers_tokenizers.convert_gguf_tokenizer(architecture, parts)
    return PreTrainedTokenizerFast(
        tokenizer_object=_completed(backend, gguf, header),
        **{name: said[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")},
        add_bos_token=_adds(header, "bos"),
        add_eos_token=_adds(header, "eos"),
        chat_template=_templates(header.values),
        clean_up_tokenization_spaces=False,
    )


def _adds(header: Header, name: str) -> bool:
    """Whether a text gets the token of its begin or end."""
    if header.values.get(f"tokenizer.ggml.{name}_token_id") is None:
        return False
    is_usual = header.values["tokenizer.ggml.model"] == SENTENCEPIECE or _pre(header) in WHOLE_WORDS
    return bool(header.values.get(f"tokenizer.ggml.add_{name}_token", is_usual and name == "bos"))


def _templates(values: Mapping[str, Any]) -> str | dict[str, str] | None:
    """One, or several by name."""
    named = {key.removeprefix(f"{TEMPLATE}."): text for key, text in values.items() if key.startswith(f"{TEMPLATE}.")}
    default = values.get(TEMPLATE)
    return ({"default": default} if default else {}) | named if named else default


def _completed(backend: Any, gguf: Path, header: Header) -> Any:
    """The tokenizer with what transformers does not read."""
    from tokenizers import AddedToken, Tokenizer

    state = {**json.loads(backend.to_str()), "post_processor": None}  # which is made anew
    size = header.values["tokenizer.ggml.tokens"]
    assert isinstance(size, Array)
    # transformers' classes have tokens of their own, such as `<|endoftext|>`, for which the model has no embedding
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size.length]
    added: dict[str, bool] = {}
    if header.values["tokenizer.ggml.model"] == BYTE_LEVEL:
        state["model"]["ignore_merges"] = _pre(header) in WHOLE_WORDS
        state["pre_tokenizer"] = _split(_pre(header)) or state["pre_tokenizer"]
        state["normalizer"] = {"type": "NFC"} if _pre(header) in COMPOSED else state["normalizer"]
        added = _restore(state, gguf)
    elif header.values.get("tokenizer.ggml.add_space_prefix") is False:
        _without_prefix(state)
    completed = Tokenizer.from_str(json.dumps(state))
    for token, is_special in added.items():
        add = completed.add_special_tokens if is_special else completed.add_tokens
        add([AddedToken(token, normalized=False, special=is_special)])
    return completed


def _split(pre: str) -> dict[str, Any] | None:
    if pre not in SPLITS:
        return None
    cuts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in SPLITS[pre]
    ]
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*cuts, bytes_alone]}


def _restore(state: dict[str, Any], gguf: Path) -> dict[str, bool]:
    """Gives control tokens that transformers has spelled in bytes, such as DeepSeek's `<｜User｜>`, their text again;
    returns them, and whether they are special."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    keys = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
    values = gguf_header.read(gguf, frozenset(keys)).values
    tokens, kinds = (value.items if isinstance(value := values[key], Array) else () for key in keys)
    known = {token["content"] for token in state["added_tokens"]}
    spelling = bytes_to_unicode()
    vocabulary = state["model"]["vocab"]
    restored: dict[str, bool] = {}
    for index, (value, kind) in enumerate(zip(tokens, kinds, strict=True)):
        token = str(value)
        if kind not in (CONTROL, USER_DEFINED) or token in known:
            continue
        spelled = "".join(spelling[byte] for byte in token.encode())
        if vocabulary.get(spelled) == index:
            del vocabulary[spelled]
            vocabulary[token] = index
            restored[token] = kind == CONTROL
    return restored


def _without_prefix(state: dict[str, Any]) -> None:
    """No space before a text's first word, nor one less in what is decoded."""
    if (state["pre_tokenizer"] or {}).get("type") == "Metaspace":
        state["pre_tokenizer"]["prepend_scheme"] = "never"
    for name, part, kind in (("normalizer", "normalizers", "Prepend"), ("decoder", "decoders", "Strip")):
        if (state[name] or {}).get("type") == "Sequence":
            state[name][part] = [step for step in state[name][part] if step["type"] != kind]
