"""The real server, as a user starts it on a machine with a GPU."""

import json
from pathlib import Path

import httpx2
import torch
from process import MAIN, Server, serve

BODY = {"model": "Tiny-Qwen3", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 24, "temperature": 0}


def test_chats_and_streams(tiny_checkpoint: Path, device: torch.device, tmp_path: Path) -> None:
    settings = {"MODEL_PATH": str(tiny_checkpoint), "MODEL_DIR": str(tmp_path), "DEVICE_MAP": "auto"}
    if device.type == "cpu":
        settings["DEVICE_MAP"] = "cpu"
    with serve(MAIN, is_cold=True, **settings) as server:
        server.wait_until_healthy()
        whole = server.post("/v1/chat/completions", **BODY).json()
        assert "choices" in whole, whole
        again = server.post("/v1/chat/completions", **BODY).json()
        text = whole["choices"][0]["message"]["content"]
        assert whole["usage"]["completion_tokens"] > 0 and again["choices"] == whole["choices"]
        assert streamed(server) == text
        log = "".join(server.lines)
        assert "compared with transformers" in log and "Traceback" not in log
        print(log)


def streamed(server: Server) -> str:
    text = ""
    with httpx2.stream(
        "POST", server.url + "/v1/chat/completions", json={**BODY, "stream": True}, timeout=60
    ) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    text += choice["delta"].get("content") or ""
    return text
