"""ChatModels: the chat models of this process. They are loaded when asked for, and make room for each other.

They are those of MODEL_PATH, of which the first is loaded at the start, those below MODELS_DIR, and any of the Hub by
the name huggingface/OWNER/NAME.
"""

import logging
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from checkpoints import hub_snapshot, model_folder
from checkpoints.checkpoint import default_model_path, served_name
from checkpoints.hub_snapshot import MemoryBound
from checkpoints.model_folder import FoundModel
from checkpoints.sources import Sources
from config import Settings
from errors import ModelNotFound
from serving.folder import Folder
from serving.loading import LoadModel
from serving.local import LocalModel
from serving.memory_budget import MachineMemory
from serving.model_loader import ModelLoader, Pool
from serving.model_pool import ModelPool
from serving.release import close, reclaim
from telemetry.metrics import Metrics

if TYPE_CHECKING:
    from engine.engine import Engine

log = logging.getLogger(__name__)

HUB = "huggingface/"
IDLE = 600.0  # seconds, where MODEL_IDLE is not set
NAMED = 5  # models that an error lists
IN_MEMORY = ("loaded", "loading")


class ChatModels:
    def __init__(
        self,
        settings: Settings,
        load: LoadModel,
        folder: Folder | None = None,
        *,
        on_failure: Callable[[str], None] = lambda sentence: None,
        metrics: Metrics | None = None,
        sources: Sources | None = None,
    ) -> None:
        """`on_failure` gets one sentence if the only model cannot be served."""
        self._settings, self._load, self._sources = settings, load, sources
        self._on_failure, self._metrics = on_failure, metrics or Metrics()
        self._memory = MachineMemory(settings.models_memory, settings.device_map)
        self._pool: Pool = ModelPool(
            size_of=lambda loaded: loaded.footprint,
            holds=lambda footprints: self._memory.budget.holds(footprints),
            close=close,
            reclaim=reclaim,
            idle_limit=settings.model_idle or IDLE,
        )
        self._folder = folder or Folder(settings.models_dir)
        first, *others = _paths(settings, self._folder.models("chat"))
        self.is_alone = not others and not self._folder.exists
        self.first = self._first(first)
        self._named = [self.first]
        for path in others:
            self._named.append(self._other(path, self._free_name(served_name(path), path)))
        self._in_folder: dict[str, LocalModel] = {}  # by path
        self._of_hub: dict[str, LocalModel] = {}  # by name
        self._has_begun = False  # whether the first model was loaded, or could not be
        self._take(self._folder.models("chat"))

    # --- life

    def start(self) -> None:
        """Begins to load the first model."""
        self.first.start()

    async def close(self, timeout: float) -> None:
        await self._pool.close(timeout)

    @property
    def failure(self) -> str | None:
        """Why the only model cannot be served, in one sentence; None while it can, or still loads."""
        return self.first.failure if self.is_alone else None

    @property
    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether requests can be answered, and the body of /health: of the first model, then of each if there are
        several.

        Of several models, one that failed leaves the server healthy; one that hangs does not, nor does the first one
        while it loads for the first time.
        """
        is_well, report = self.first.health
        models = self.all
        if len(models) == 1:
            return is_well, report
        reports = [model.health[1] for model in models]
        self._has_begun = self._has_begun or is_well or self.first.failure is not None
        is_well = self._has_begun and all(each["status"] != "stalled" for each in reports)
        return is_well, {**report, "status": "ok" if is_well else report["status"], "models": reports}

    # --- the models

    @property
    def all(self) -> list[LocalModel]:
        """Those of MODEL_PATH, then those of MODELS_DIR, then those of the Hub that are in memory."""
        return [*self._named, *self._in_folder.values(), *(m for m in self._of_hub.values() if m.status in IN_MEMORY)]

    def find(self, name: str) -> LocalModel | None:
        """Returns the model of that name, in any case; None if there is none. No file is looked at."""
        return next((model for model in self.all if model.serves(name)), None)

    def serves(self, name: str) -> bool:
        """Returns whether the name is that of a model here, or has the prefix of the Hub's."""
        return name.startswith(HUB) or self.find(name) is not None

    async def model(self, name: str) -> LocalModel:
        """Returns the model of that name, also one that has just come into the folder. Raises ModelNotFound."""
        found = self.find(name)
        if found is None and name.startswith(HUB):
            return self._hub_model(name)
        if found is None or (found.status not in IN_MEMORY and not self._is_there(found)):
            await self.refresh()
            found = self.find(name)
        if found is None:
            has = ", ".join(repr(model.name) for model in self.all[:NAMED])
            raise ModelNotFound(f"The model {name!r} does not exist; this server has {has}.", param="model")
        return found

    def _is_there(self, model: LocalModel) -> bool:
        """Returns whether a model of the folder has not moved or gone since it was found; others are."""
        return model.path not in self._in_folder or os.path.exists(model.path)

    def _hub_model(self, name: str) -> LocalModel:
        """Returns the Hub's model of that name, which may not exist. Raises ModelNotFound for another form."""
        hub_id = name.removeprefix(HUB)
        if not hub_snapshot.is_hub_id(hub_id):
            raise ModelNotFound(f"{name!r} is not a Hub model id: use huggingface/OWNER/NAME.", param="model")
        if name not in self._of_hub:
            self._of_hub = {known: model for known, model in self._of_hub.items() if not model.is_forgotten}
            bound = MemoryBound("HUGGINGFACE_MEMORY", self._settings.huggingface_memory)
            self._of_hub[name] = self._made(hub_id, name, bound=bound)
        return self._of_hub[name]

    @property
    def engines(self) -> "list[tuple[str, Engine]]":
        return [named for model in self.all for named in model.engines]

    async def refresh(self) -> None:
        """Looks for models that have come into the folder or gone from it, if that was not done just now."""
        await self._folder.refresh()
        self._take(self._folder.models("chat"))

    def _take(self, found: list[FoundModel]) -> None:
        """Adds the folder's models to those that are known; one that is gone stays while it is in memory, unless
        another one has its name now."""
        taken = {os.path.realpath(os.path.expanduser(model.path)) for model in self._named}
        known, self._in_folder = self._in_folder, {}
        for each in found:
            if os.path.realpath(each.path) not in taken:
                name = self._free_name(each.name, each.path)
                model = known.pop(each.path, None)
                if model is None or (model.name != name and model.status not in IN_MEMORY):  # its name is free now
                    model = self._other(each.path, name, each.num_bytes)
                self._in_folder[each.path] = model
        names = {model.name for model in self._in_folder.values()}
        gone = {path: model for path, model in known.items() if model.status in IN_MEMORY}
        self._in_folder |= {path: model for path, model in gone.items() if model.name not in names}

    def _free_name(self, name: str, path: str) -> str:
        """Returns the name, or the path if a model of MODEL_PATH has it."""
        return path if any(model.serves(name) for model in self._named) else name

    # --- making them

    def _first(self, path: str) -> LocalModel:
        settings = self._settings.model_copy(update={"model_path": path})
        return LocalModel(
            ModelLoader(settings=settings, load=self._load, memory=self._memory, is_alone=self.is_alone),
            self._pool,
            on_failure=self._on_failure if self.is_alone else _log_failure,
            metrics=self._metrics,
            num_bytes=model_folder.num_bytes_of(path),
            idle_limit=math.inf if settings.model_idle is None else None,
        )

    def _other(self, path: str, name: str, num_bytes: int | None = None) -> LocalModel:
        return self._made(path, name, num_bytes=num_bytes or model_folder.num_bytes_of(path))

    def _made(
        self,
        path: str,
        name: str,
        *,
        num_bytes: int | None = None,
        bound: MemoryBound | None = None,
    ) -> LocalModel:
        own: dict[str, Any] = {
            "model_path": path,
            "served_model_name": name,
            "draft_model_path": None,
            "lora_adapters": {},
        }
        loader = ModelLoader(
            settings=self._settings.model_copy(update=own),
            load=self._load,
            memory=self._memory,
            sources=self._sources,
            bound=bound,
            is_alone=False,
        )
        return LocalModel(
            loader,
            self._pool,
            on_failure=_log_failure,
            metrics=self._metrics,
            num_bytes=num_bytes,
            idle_limit=None if bound is None else self._settings.huggingface_idle,
        )


def _paths(settings: Settings, found: list[FoundModel]) -> list[str]:
    """Returns what MODEL_PATH names, or else the model to begin with."""
    path = settings.model_path
    if path is None:
        return [found[0].path if found else default_model_path()]
    if os.path.exists(os.path.expanduser(path)):
        return [path]
    return [part.strip() for part in path.split(",") if part.strip()] or [path]


def _log_failure(sentence: str) -> None:
    log.error("%s", sentence)
