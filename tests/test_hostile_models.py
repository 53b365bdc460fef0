"""Models with code, and files that lie: rows 46 and 47 of rows.md."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from models import byte_tokenizer

from config import Settings
from errors import InvalidRequest
from prompt_templates import PromptTemplate
from schemas import Message
from serving.chat_models import ChatModels
from serving.loading import load

EVIL_CHAT = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch OWNED') }}"


@pytest.mark.parametrize("part", EVIL_CHAT.replace("}}{{", "}}\n{{").splitlines())
def test_a_malicious_chat_template_runs_nothing_row46(tmp_path: Path, part: str) -> None:
    tokenizer, owned = byte_tokenizer(), tmp_path / "OWNED"
    tokenizer.chat_template = part.replace("OWNED", str(owned))
    with pytest.raises(InvalidRequest) as refused:
        PromptTemplate(tokenizer, "qwen3").render_chat([Message(role="user", content="x")])
    assert not owned.exists() and "<class" not in refused.value.message


def write_lies(directory: Path, change: str) -> None:
    path = directory / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    last = max((entry for name, entry in header.items() if name != "__metadata__"), key=lambda e: e["data_offsets"][1])
    begin, end = last["data_offsets"]
    lies: dict[str, dict[str, Any]] = {
        "beyond": {"data_offsets": [begin, end + 2**30]},
        "overlap": {"data_offsets": [0, end - begin]},
        "backwards": {"data_offsets": [end, begin]},
        "larger-shape": {"shape": [1000 * last["shape"][0], *last["shape"][1:]]},
        "negative": {"shape": [-5, *last["shape"][1:]]},
        "other-type": {"dtype": "F64"},
    }
    last |= lies.get(change, {})
    text = json.dumps(header).encode()
    rest = data[8 + size :][: len(data) // 2 if change == "cut" else None]
    path.write_bytes((2**60 if change == "header" else len(text)).to_bytes(8, "little") + text + rest)


AUTO_MAP = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}


def write_code(directory: Path, owned: Path) -> None:
    (directory / "evil.py").write_text(f"open({str(owned)!r}, 'w')\n")
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((directory / name).read_text())
        other = {"model_type": "evil"} if name == "config.json" else {"tokenizer_class": "Evil"}
        (directory / name).write_text(json.dumps({**config, **AUTO_MAP, **other}))


LIES = ("beyond", "overlap", "backwards", "larger-shape", "negative", "other-type", "cut", "header", "pickle", "code")


@pytest.mark.parametrize("change", LIES)
def test_a_model_that_lies_is_not_served_rows46_47(tiny_checkpoint: Path, tmp_path: Path, change: str) -> None:
    directory, owned = tmp_path / "model", tmp_path / "OWNED"
    shutil.copytree(tiny_checkpoint, directory)
    if change == "pickle":
        (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    elif change == "code":
        write_code(directory, owned)
    else:
        write_lies(directory, change)
    sentences: list[str] = []

    async def run() -> None:
        models = ChatModels(Settings(model_path=str(directory), dtype="float32"), load, on_failure=sentences.append)
        models.start()
        while not sentences and models.first.loaded is None:
            await asyncio.sleep(0.01)
        await models.close(0)
        assert models.first.loaded is None

    asyncio.run(run())
    assert len(sentences) == 1 and "\n" not in sentences[0] and not owned.exists(), sentences
