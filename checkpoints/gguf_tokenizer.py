"""The tokenizer of a GGUF file: the one that transformers makes of it, completed with what transformers leaves out.

A file with an unknown key, or an unknown way to split text, is refused by its name.

Source: llama.cpp's llama-vocab.cpp, for what a key means and its default.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints import gguf_ends, gguf_header
from checkpoints.gguf_ends import CONTROL
from checkpoints.gguf_header import Array, Header

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # kinds of vocabularies
USER_DEFINED = 4  # a kind of token

PREFIX = "tokenizer."
TEMPLATE = "tokenizer.chat_template"
HONOURED = {
    *("ggml.model", "ggml.pre", "ggml.tokens", "ggml.token_type", "ggml.scores", "ggml.merges"),
    *("ggml.bos_token_id", "ggml.eos_token_id", "ggml.eot_token_id", "ggml.eom_token_id"),
    "ggml.eos_token_ids",
    *("ggml.unknown_token_id", "ggml.padding_token_id", "ggml.add_bos_token", "ggml.add_eos_token"),
    *("ggml.add_space_prefix", "chat_template", "chat_templates"),
}
NO_EFFECT = {  # keys that change no text's tokens in these two kinds of vocabularies
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
# tokenizer.ggml.pre -> regular expressions, each of which cuts the pieces of the ones before
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
UNKNOWN = "default"  # tokenizer.ggml.pre where the key is missing (before May 2024), or a converter knew no better
FAMILY_SPLITS = {  # how all models of an architecture split text; `default` is wrong for them
    **dict.fromkeys(("qwen2", "qwen2moe", "qwen3", "qwen3moe"), "qwen2"),
    **{"gpt2": "gpt-2", "starcoder2": "starcoder"},
}
VOCABULARY_SPLITS = {("llama", 128256): "llama-bpe"}  # architecture and number of tokens: Llama 3
# Splits before which a letter and its accent become one character: files leave it out, transformers' classes do it
COMPOSED = {"qwen2", "qwen35", "command-r", "olmo", "mpt"}
WHOLE_WORDS = {  # splits with which a word of the vocabulary is not cut, and each text begins with a special token
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    "tekken",
}


def check(header: Header, known_splits: "set[str] | None" = None) -> None:
    """Raises ValueError with a sentence for a tokenizer that is not supported.

    known_splits: those of transformers; None leaves out the check of how text is split, which needs transformers.
    """
    values = header.values
    kind = values.get("tokenizer.ggml.model")
    if kind not in (BYTE_LEVEL, SENTENCEPIECE):
        has_none = kind in (None, "none", "no_vocab")
        problem = "it has no tokenizer" if has_none else f"its key tokenizer.ggml.model is {kind}"
        raise ValueError(f"{problem}; {BYTE_LEVEL} and {SENTENCEPIECE} are supported")
    required = ["tokens", "token_type"]
    if kind == BYTE_LEVEL:
        required.append("merges")
    elif "tokenizer.ggml.merges" not in values:
        required.append("scores")
    for key in required:
        if not isinstance(values.get(f"tokenizer.ggml.{key}"), Array):
            raise ValueError(f"its tokenizer is incomplete: it lacks the key tokenizer.ggml.{key}")
    for key in values:
        name = key.removeprefix(PREFIX)
        if key.startswith(PREFIX) and name not in HONOURED | NO_EFFECT and not key.startswith(f"{TEMPLATE}."):
            raise ValueError(f"its key {key} is not supported")
    if kind == BYTE_LEVEL and known_splits is not None and (pre := _pre(header)) not in known_splits | SPLITS.keys():
        raise ValueError(f"its key tokenizer.ggml.pre is {pre}, which is an unknown way to split text")


def _pre(header: Header) -> str:
    """Returns how text is split: as the file says, or else as its family does. llama.cpp takes `default` where the key
    is missing, and warns that answers will be worse."""
    split = str(header.values.get("tokenizer.ggml.pre", UNKNOWN))
    return split if split != UNKNOWN else _family_split(header) or UNKNOWN


def _family_split(header: Header) -> str | None:
    architecture, tokens = str(header.values.get("general.architecture")), header.values.get("tokenizer.ggml.tokens")
    number = tokens.length if isinstance(tokens, Array) else 0
    return VOCABULARY_SPLITS.get((architecture, number)) or FAMILY_SPLITS.get(architecture)


def warnings(header: Header) -> list[str]:
    """Returns a warning if neither the file nor its family determines how text is split, and one for tokens that it
    marks wrongly. header: read with gguf_ends.LISTS."""
    found = []
    is_byte_level = header.values.get("tokenizer.ggml.model") == BYTE_LEVEL
    if is_byte_level and "tokenizer.ggml.pre" not in header.values and not _family_split(header):
        found.append(
            "it lacks the key tokenizer.ggml.pre, so text is split by llama.cpp's default, which may not "
            "be how the model was trained: a file by a newer converter may answer better"
        )
    if texts := list(gguf_ends.unmarked(header).values()):
        found.append(f"it does not mark {', '.join(texts)} as control tokens, which end answers: they are read as such")
    return found


def load(gguf: Path, header: Header) -> "PreTrainedTokenizerFast":
    """Returns the file's tokenizer. Raises ValueError with a sentence, or any error of transformers'."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import gguf_tokenizer_mapping as transformers_tokenizers

    check(header, set(transformers_tokenizers.GGUF_PRE_TOKENIZER_SPLITS))
    header = gguf_header.read(gguf, gguf_ends.LISTS)
    architecture, parts, special = transformers_tokenizers.get_gguf_tokenizer(str(gguf))
    if header.values["tokenizer.ggml.model"] == BYTE_LEVEL:
        parts["pre_tokenizer_type"] = _pre(header)
    backend, _ = transformers_tokenizers.convert_gguf_tokenizer(architecture, parts)
    return PreTrainedTokenizerFast(
        tokenizer_object=_completed(backend, header),
        **{name: special[name] or text for name, text in _special_texts(header).items()},
        add_bos_token=_adds(header, "bos"),
        add_eos_token=_adds(header, "eos"),
        chat_template=_templates(header.values),
        clean_up_tokenization_spaces=False,
    )


def _special_texts(header: Header) -> dict[str, str | None]:
    """Returns the texts of special tokens, by transformers' names, also of those for which the file has no key."""
    tokens = _list(header, gguf_ends.TOKENS)
    names = {"bos_token": "bos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: gguf_ends.named_id(header, own) for name, own in names.items()}
    ids["eos_token"] = next(iter(gguf_ends.ends(header)), None)
    return {name: str(tokens[i]) if i is not None and 0 <= i < len(tokens) else None for name, i in ids.items()}


def _list(header: Header, key: str) -> tuple[Any, ...]:
    value = header.values[key]
    assert isinstance(value, Array)
    return value.items


def _adds(header: Header, name: str) -> bool:
    """Returns whether the token `name`, "bos" or "eos", is added to each text."""
    if gguf_ends.named_id(header, name) is None:
        return False
    has_begin = header.values["tokenizer.ggml.model"] == SENTENCEPIECE or _pre(header) in WHOLE_WORDS
    return bool(header.values.get(f"tokenizer.ggml.add_{name}_token", has_begin and name == "bos"))


def _templates(values: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Returns the chat template, or a dictionary if the file has several by name."""
    named = {key.removeprefix(f"{TEMPLATE}."): text for key, text in values.items() if key.startswith(f"{TEMPLATE}.")}
    default = values.get(TEMPLATE)
    return ({"default": default} if default else {}) | named if named else default


def _completed(backend: Any, header: Header) -> Any:
    """Returns the tokenizer with what transformers does not read from the file."""
    from tokenizers import AddedToken, Tokenizer

    state = {**json.loads(backend.to_str()), "post_processor": None}  # PreTrainedTokenizerFast makes its own
    size = header.values["tokenizer.ggml.tokens"]
    assert isinstance(size, Array)
    # transformers' classes add tokens such as `<|endoftext|>`, for which the model may have no embedding
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size.length]
    odd = gguf_ends.unmarked(header)
    for token in state["added_tokens"]:
        token["special"] |= token["id"] in odd
    known = {token["content"] for token in state["added_tokens"]}
    added = dict.fromkeys((text for text in odd.values() if text not in known), True)
    if header.values["tokenizer.ggml.model"] == BYTE_LEVEL:
        state["model"]["ignore_merges"] = _pre(header) in WHOLE_WORDS
        state["pre_tokenizer"] = _split(_pre(header)) or state["pre_tokenizer"]
        state["normalizer"] = {"type": "NFC"} if _pre(header) in COMPOSED else state["normalizer"]
        added |= _restore(state, header)
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


def _restore(state: dict[str, Any], header: Header) -> dict[str, bool]:
    """Restores control tokens that transformers spells in bytes, such as DeepSeek's `<｜User｜>`.

    Returns each restored token, and whether it is special."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens, kinds = (_list(header, key) for key in (gguf_ends.TOKENS, gguf_ends.KINDS))
    odd = gguf_ends.unmarked(header)
    added = {token["content"] for token in state["added_tokens"]}
    spelling = bytes_to_unicode()
    vocabulary = state["model"]["vocab"]
    restored: dict[str, bool] = {}
    for index, (value, kind) in enumerate(zip(tokens, kinds, strict=True)):
        token = str(value)
        if (kind not in (CONTROL, USER_DEFINED) and index not in odd) or token in added:
            continue
        spelled = "".join(spelling[byte] for byte in token.encode())
        if vocabulary.get(spelled) == index:
            del vocabulary[spelled]
            vocabulary[token] = index
            restored[token] = kind == CONTROL or index in odd
    return restored


def _without_prefix(state: dict[str, Any]) -> None:
    """Removes the steps that add a space before a text's first word, and that take it away again in decoded text."""
    if (state["pre_tokenizer"] or {}).get("type") == "Metaspace":
        state["pre_tokenizer"]["prepend_scheme"] = "never"
    for name, part, kind in (("normalizer", "normalizers", "Prepend"), ("decoder", "decoders", "Strip")):
        if (state[name] or {}).get("type") == "Sequence":
            state[name][part] = [step for step in state[name][part] if step["type"] != kind]
