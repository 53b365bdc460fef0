"""Images as LangChain and the openai SDK send them, to tiny models that see."""

import base64
import os
import struct
import subprocess
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import interpreter
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from openai import OpenAI
from process import ROOT, Server, serve

MODEL = "Tiny-Vision"
SAVED = {  # kind of model -> what saves it in a directory, and the fewest tokens of an image
    "gemma3": ("from models import *; save_checkpoint_that_sees(directory)", 16),
    "gemma4": ("from seeing_models import *; save_seeing_checkpoint(directory, 'gemma4_small')", 60),
    "qwen3_vl": ("from seeing_models import *; save_seeing_checkpoint(directory, 'qwen3_vl')", 4),
}
Seeing = tuple[Server, int]


@pytest.fixture(scope="module", params=SAVED)
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seeing]:
    python = interpreter("SERVER_PYTHON")
    directory = tmp_path_factory.mktemp("models") / MODEL
    save, tokens = SAVED[request.param]
    code = f"import sys; from pathlib import Path; directory = Path(sys.argv[1]); {save}"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    subprocess.run([python, "-c", code, str(directory)], env={**os.environ, "PYTHONPATH": paths}, check=True)
    with serve([python, "main.py", "--port", "0"], MODEL_PATH=str(directory)) as server:
        server.wait_until_healthy()
        yield server, tokens


def png(colour: bytes) -> str:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress((b"\0" + colour * 8) * 8))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")).decode()


RED = png(b"\xff\0\0")
BLOCKS: dict[str, dict[str, Any]] = {
    "openai": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{RED}", "detail": "low"}},
    "standard": {"type": "image", "base64": RED, "mime_type": "image/png"},
    "older": {"type": "image", "source_type": "base64", "data": RED, "mime_type": "image/png"},
}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("responses", [False, True])
def test_a_langchain_image_message_is_answered(seeing: Seeing, kind: str, responses: bool) -> None:
    server, tokens = seeing
    llm = ChatOpenAI(
        model=MODEL,
        base_url=server.url + "/v1",
        api_key="none",
        max_tokens=8,
        use_responses_api=responses,
    )
    plain = llm.invoke([HumanMessage("What is this?")])
    seen = llm.invoke([HumanMessage([{"type": "text", "text": "What is this?"}, BLOCKS[kind]])])
    assert plain.usage_metadata and seen.usage_metadata
    assert seen.usage_metadata["input_tokens"] >= plain.usage_metadata["input_tokens"] + tokens


def test_the_sdks_vision_sample_is_answered(seeing: Seeing) -> None:
    server, tokens = seeing
    with OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        response = client.chat.completions.create(
            model=MODEL,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What's in this image?"},
                        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{RED}"}},
                    ],
                }
            ],
            max_tokens=8,
        )
    assert response.usage and response.usage.prompt_tokens > tokens and response.choices[0].finish_reason
