"""Checks whether a tokenizer does what its tokenizer.json says.

transformers builds some tokenizers from the class that tokenizer_config.json names, with that class's rules for cutting
text, and takes only the vocabulary from tokenizer.json. A model whose files name another class than the one that it was
trained with (`GPT2Tokenizer` with the rules of Llama 3, say) would silently read other tokens.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

PARTS = ("normalizer", "pre_tokenizer", "decoder")
FLAGS = ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback", "ignore_merges")
MAX_HEAD_SIZE = 2**22  # bytes
MODEL, VOCABULARY = re.compile(r'"model"\s*:\s*\{'), re.compile(r'"vocab"\s*:')


def departures(tokenizer: Any, directory: Path) -> list[str]:
    """Returns the parts in which the loaded tokenizer has other rules than the one in the file, if that is a BPE one.

    It takes milliseconds, since the vocabulary is not read; none are found in a file that the library did not write.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    head = _head(directory / "tokenizer.json")
    if backend is None or head is None:
        return []
    from tokenizers import Tokenizer

    empty = {"type": "BPE", "vocab": {}, "merges": []}
    described = Tokenizer.from_str(json.dumps({**head, "added_tokens": [], "post_processor": None, "model": empty}))
    changed = [part for part in PARTS if _state(getattr(described, part)) != _state(getattr(backend, part))]
    if {str(_state(one.decoder).get("type")) for one in (described, backend) if one.decoder} == {"ByteLevel"}:
        changed = [part for part in changed if part != "decoder"]  # its options are those of the other direction
    flags = head["model"]
    return changed + [
        name
        for name in FLAGS
        if name in flags and (flags[name] or None) != (getattr(backend.model, name, None) or None)
    ]


def by_its_file(tokenizer: Any, directory: Path) -> Any:
    """Returns the same tokenizer, or the one that tokenizer.json describes if that has other rules."""
    changed = departures(tokenizer, directory)
    if not changed:
        return tokenizer
    from transformers import PreTrainedTokenizerFast

    log.info(
        "%s is read from tokenizer.json, not as a %s: the two differ in %s",
        directory.name,
        type(tokenizer).__name__,
        ", ".join(changed),
    )
    return PreTrainedTokenizerFast.from_pretrained(directory)


def _state(part: Any) -> Any:
    return None if part is None else _rules(json.loads(part.__getstate__()))


def _rules(state: Any) -> Any:
    """Drops what changes no tokens: where the offsets of a token begin."""
    if isinstance(state, list):
        return [_rules(item) for item in state]
    if isinstance(state, dict):
        return {key: _rules(value) for key, value in state.items() if key != "trim_offsets"}
    return state


def _head(path: Path) -> dict[str, Any] | None:
    """Returns all that comes before the vocabulary; None for a file of another layout or model."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        text = file.read(MAX_HEAD_SIZE).decode(errors="ignore")
    model = MODEL.search(text)
    vocabulary = model and VOCABULARY.search(text, model.end())
    if vocabulary is None:
        return None
    try:
        head = json.loads(text[: vocabulary.start()] + '"vocab": null}}')
    except ValueError:
        return None
    is_known = isinstance(head, dict) and isinstance(head.get("model"), dict)
    return head if is_known and head["model"].get("type", "BPE") == "BPE" else None
