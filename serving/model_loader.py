"""ModelLoader: the files of a model here, then its weights in memory, within what all models may take."""

import importlib
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints import checkpoint, hub_snapshot, model_directory
from checkpoints.progress import Progress
from checkpoints.sources import Sources
from config import Settings
from errors import ModelLoadError
from serving.loading import IMPORTING, LoadedModel, LoadModel
from serving.memory_budget import Footprint, MachineMemory
from serving.model_pool import ModelPool
from serving.model_slot import in_daemon_thread

Pool = ModelPool[Any, LoadedModel, Footprint]  # by LocalModel


@dataclass(frozen=True, kw_only=True)
class ModelLoader:
    """How one model of this process is loaded."""

    settings: Settings  # its MODEL_PATH is this model's
    load: LoadModel
    memory: MachineMemory
    sources: Sources | None = None
    bound: hub_snapshot.MemoryBound | None = None  # of a Hub model that a client chose
    is_alone: bool = True  # whether no other model is there to make room for

    def names(self, name: str, path: str) -> set[str]:
        """Returns what requests may call the model. One of several, or of the Hub, takes no name that may mean
        another one."""
        if self.bound is not None:
            return {name}
        return {name, path, checkpoint.served_name(path)} if self.is_alone else {name, path}

    async def loaded(self, path: str, progress: Progress, pool: Pool) -> LoadedModel:
        """Fetches the model's files, for which other loads do not wait, and loads them when there is room.

        Raises ModelLoadError, or what `load` raises.
        """
        checkpoint.check(path)
        directory = await in_daemon_thread(partial(self._fetch, path, progress))
        weights = await in_daemon_thread(partial(self._weights, path, directory, progress))
        cache = self._cache_memory(path, weights)
        settings = self.settings.model_copy(update={"kv_cache_memory": cache})
        footprint = self.memory.budget.spread(weights + (cache or 0))
        if not self.is_alone and not self.memory.budget.holds([footprint]):  # before others are unloaded for it
            raise ModelLoadError(
                f"{path} takes {(weights + (cache or 0)) / 2**30:.2f} GiB with its cache, but models may take "
                f"{self.memory.budget.total / 2**30:.2f} GiB of this machine (MODELS_MEMORY): use a smaller model, "
                "or lower KV_CACHE_MEMORY."
            )
        async with pool.room_for(footprint):
            place = path if self.bound is None else str(directory)
            loaded = await in_daemon_thread(partial(self.load, place, settings, progress))
        if cache is None:
            footprint = self.memory.budget.spread(weights + loaded.engine.cache_bytes)
        return replace(loaded, footprint=footprint)

    def _fetch(self, path: str, progress: Progress) -> Path:
        """Returns the directory with the model's files, which are downloaded and converted first if necessary."""
        sources = self.sources or Sources()
        if self.bound is not None:
            return hub_snapshot.fetch(path, progress.report, sources, self.bound)
        return checkpoint.fetch(path, self.settings.cache_dir, progress.report, sources).directory

    def _draft(self, progress: Progress) -> list[Path]:
        """Returns the directory of the model that guesses tokens, if there is one."""
        settings = self.settings
        path = settings.draft_model_path if settings.num_speculative_tokens else None
        sources = self.sources or Sources()
        return [checkpoint.fetch(path, settings.cache_dir, progress.report, sources).directory] if path else []

    def _weights(self, path: str, directory: Path, progress: Progress) -> int:
        """Returns the bytes of the weights, of a draft model's too. Raises ModelLoadError if they are more than
        MODELS_MEMORY."""
        with IMPORTING:
            importlib.import_module("engine.build")  # and torch with it
        directories = [directory, *self._draft(progress)]
        weights = sum(weights_bytes(each, self.settings) for each in directories)
        limit = self.settings.models_memory
        if limit is not None and weights > limit:
            raise ModelLoadError(
                f"The weights of {path} take {weights / 2**30:.2f} GiB, but MODELS_MEMORY is {limit / 2**30:.2f} GiB: "
                "raise it, or use a smaller model."
            )
        assert self.memory.budget  # which is looked for here, in a thread
        return weights

    def _cache_memory(self, path: str, weights: int) -> int | None:
        """Returns the bytes of the KV cache: a share of what the weights leave, if other models may need room.

        Raises ModelLoadError for one that does not fit into MODELS_MEMORY beside the weights.
        """
        cache, limit = self.settings.kv_cache_memory, self.settings.models_memory
        if cache is not None and limit is not None and weights + cache > limit:
            raise ModelLoadError(
                f"The weights of {path} and KV_CACHE_MEMORY take {(weights + cache) / 2**30:.2f} GiB, but "
                f"MODELS_MEMORY is {limit / 2**30:.2f} GiB: raise it, or lower KV_CACHE_MEMORY."
            )
        if cache is not None or (self.is_alone and limit is None):
            return cache
        from engine.build import CPU_CACHE_MEMORY, CPU_CACHE_SHARE

        cache = int(CPU_CACHE_SHARE * max(0, self.memory.budget.total - weights))
        return cache if is_on_gpu(self.settings) else min(cache, CPU_CACHE_MEMORY)


def weights_bytes(directory: Path, settings: Settings) -> int:
    """Returns the bytes of a model's weights in the format that they will have in memory, about."""
    from engine import weight_files
    from engine.checked_model import choose_dtype
    from engine.cpu import packed_checkpoint
    from engine.cpu.packed_weight import format_of
    from engine.model_loader import choose_quantization
    from engine.quantization import FROM_FILE

    weights = choose_quantization(settings.quantization, settings.dtype, is_on_gpu(settings), directory)
    if weights is FROM_FILE:
        return packed_checkpoint.size(directory)
    on_disk = model_directory.weights_size(directory)
    config = _config(directory)
    if any(isinstance(part, dict) and "quantization_config" in part for part in (config, config.get("text_config"))):
        return on_disk
    num_elements = sum(tensor.num_elements for tensor in weight_files.read_headers(directory).values())
    if weights.packed_bits is None:
        dtype = choose_dtype(settings.dtype, str(config.get("model_type")), is_on_gpu(settings))
        return num_elements * dtype.itemsize
    return min(on_disk, int(num_elements * format_of(weights.packed_bits).bytes_per_weight))


def is_on_gpu(settings: Settings) -> bool:
    import torch

    return settings.device_map != "cpu" and torch.cuda.is_available()


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None  # `check_model` will say what is wrong
    return config if isinstance(config, dict) else {}
