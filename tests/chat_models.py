"""Chat models for tests: a pool of tiny ones, and what holds up or spoils a load."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import torch

from api.streaming import collect_chat
from checkpoints.progress import Progress
from checkpoints.sources import Sources
from config import Settings
from engine.batch import Batch
from errors import ModelLoadError
from schemas import ChatCompletionRequest
from serving.chat_models import ChatModels
from serving.loading import LoadedModel, load

MIB = 2**20


def run(
    scenario: Callable[[ChatModels], Coroutine[Any, Any, None]],
    *,
    load: Any = load,
    hub: Path | None = None,
    **settings: Any,
) -> None:
    async def within_a_minute() -> None:
        values = {"max_model_len": 128, "dtype": "float32", "quantization": "none", **settings}
        own = Settings.model_validate({"kv_cache_memory": MIB, **values})
        models = ChatModels(own, load, sources=Sources(endpoint=None, hub_cache=hub))
        try:
            async with asyncio.timeout(100):
                await scenario(models)
        finally:
            await models.close(1)

    asyncio.run(within_a_minute())


async def ask(models: ChatModels, name: str, **more: Any) -> Any:
    body = {"model": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0, **more}
    model = await models.model(name)
    return await collect_chat(model.stream_chat(ChatCompletionRequest.model_validate(body)))


async def until(is_true: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not is_true():
            await asyncio.sleep(0.01)


def statuses(models: ChatModels) -> dict[str, str]:
    return {model.name: model.status for model in models.all}


def memory_for(num_models: int, folder: Path) -> int:
    """Returns bytes in which so many of the folder's models fit, with their caches."""
    weights = (folder / "a" / "model.safetensors").stat().st_size
    return int((num_models + 0.5) * (weights + MIB))


class Gate:
    """Loads when it is let, and fails as often as it is told."""

    def __init__(self, num_failures: int = 0) -> None:
        self.num_failures, self.num_loads, self.is_open = num_failures, 0, False

    def __call__(self, path: str, settings: Settings, progress: Progress) -> LoadedModel:
        self.num_loads += 1
        progress.report("loading weights", 0.25)
        while not self.is_open:
            time.sleep(0.01)
        if self.num_loads <= self.num_failures:
            raise ModelLoadError("The file is broken.")
        return load(path, settings, progress)


def fail(batch: Batch) -> None:
    raise torch.AcceleratorError("an illegal access")
