"""The tokens that end an answer, and the other special ones, of a GGUF file: some files mark or name them wrongly.

A file may lack the id of its end, name one of several, or call a token such as `<|im_end|>` an ordinary word. llama.cpp
then goes by the tokens' texts, and so does this file, with one difference: `</s>` as an ordinary word is an HTML tag in
the vocabularies of Qwen and Gemma, and ends an answer only where nothing else does.

Source: llama.cpp's llama-vocab.cpp.
"""

from checkpoints.gguf_header import Array, Header

TOKENS, KINDS = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
LISTS = frozenset({TOKENS, KINDS})  # keys that a header must have been read with, for texts to be known
CONTROL = 3  # a kind of token
NAMED = ("eos", "eot", "eom")  # of a text, of a turn, of a message with a call
TEXTS = frozenset(  # what ends an answer, whatever the file says of it
    {
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>", "<|endoftext|>"),
        *("<|end_of_text|>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>", "[e~["),
        "<｜end▁of▁sentence｜>",
    }
)
TAG = "</s>"
HARMONY = frozenset({"<|return|>", "<|call|>"})  # where `<|end|>` ends a message, and not the answer
SENTENCEPIECE_DEFAULTS = {"unknown": (0, "<unk>"), "bos": (1, "<s>"), "eos": (2, TAG)}  # ids of files without the key


def named_id(header: Header, name: str) -> int | None:
    """Returns the id that the file gives a special token, or else its kind of vocabulary. name: such as "eos"."""
    value = header.values.get(f"tokenizer.ggml.{name}_token_id")
    if value is None and header.values.get("tokenizer.ggml.model") == "llama" and name in SENTENCEPIECE_DEFAULTS:
        index, text = SENTENCEPIECE_DEFAULTS[name]
        return index if _items(header, TOKENS)[index : index + 1] == (text,) else None
    return value if isinstance(value, int) else None


def ends(header: Header) -> list[int]:
    """Returns the ids of all tokens that end an answer, those that the file names first."""
    named = [token for token in (*(named_id(header, name) for name in NAMED), *_further(header)) if token is not None]
    found = _by_text(header)
    tag = found.pop(TAG, None)
    if tag is not None and (_is_control(header, tag) or not (named or found)):
        named.append(tag)
    return list(dict.fromkeys([*named, *sorted(found.values())]))


def unmarked(header: Header) -> dict[int, str]:
    """Returns the tokens that end an answer and that the file does not mark as control tokens: their ids and texts."""
    tokens, found = _items(header, TOKENS), ends(header)
    texts = {index: str(tokens[index]) for index in found if 0 <= index < len(tokens)}
    return {i: text for i, text in texts.items() if text in {*TEXTS, TAG} and not _is_control(header, i)}


def _by_text(header: Header) -> dict[str, int]:
    """Returns the tokens that look as if they end an answer."""
    found = {str(text): index for index, text in enumerate(_items(header, TOKENS)) if text in TEXTS or text == TAG}
    if "<|end|>" in found and HARMONY <= set(_items(header, TOKENS)):
        del found["<|end|>"]
    return found


def _further(header: Header) -> list[int]:
    """Returns the ids of `eos_token_ids`, a number or list that Ollama writes."""
    value = header.values.get("tokenizer.ggml.eos_token_ids")
    items = value.items if isinstance(value, Array) else (value,)
    return [item for item in items if isinstance(item, int)]


def _is_control(header: Header, index: int) -> bool:
    kinds = _items(header, KINDS)
    return index < len(kinds) and kinds[index] == CONTROL


def _items(header: Header, key: str) -> tuple[object, ...]:
    """Returns a list; an empty one where the header was read without it."""
    found = header.values.get(key)
    return found.items if isinstance(found, Array) else ()
