"""ModelAdapters: the adapters (LoRA) of a model, each of which is a model of its own to clients."""

import asyncio
import logging
import re
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from config import Settings
from errors import APIError, InvalidRequest, ModelLoadError, ModelNotFound
from schemas import LoadAdapterRequest, Model
from serving.model_slot import in_daemon_thread

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.lora.adapter import Adapter

log = logging.getLogger(__name__)
_NAME = re.compile(r"[\w.:@+-]{1,200}")  # without a slash: before it stands the name of a provider


class ModelAdapters:
    """The adapters of one model: those of LORA_ADAPTERS, and those that clients have had loaded since."""

    def __init__(self, settings: Settings, base: str, taken: Collection[str]) -> None:
        """base: the name of the model. taken: all its names, in lower case."""
        self._base, self._taken = base, taken
        self._configured = {name: Path(path).expanduser() for name, path in settings.lora_adapters.items()}
        self._paths = dict(self._configured)  # of all that are served, now or once the model is loaded
        self._folder, self._max_rank, self._most = settings.lora_dir, settings.max_lora_rank, settings.max_lora_adapters
        self._served: dict[str, Adapter] = {}  # by the name in lower case, as models are found
        self._created = int(time.time())
        self._changing = asyncio.Lock()

    def serves(self, model: str) -> bool:
        """Returns whether it is the name of an adapter, which may not be read yet."""
        return any(name.casefold() == model.casefold() for name in self._paths)

    def get(self, model: str) -> "Adapter | None":
        """Returns the adapter of that name; None for other models."""
        return self._served.get(model.casefold())

    def models(self, **about_base: object) -> list[Model]:
        """Returns the adapters as /v1/models lists them. about_base: further fields, which are those of the base."""
        return [
            Model.of_server(name, self._created, **{**about_base, "root": path.name, "parent": self._base})
            for name, path in self._paths.items()
        ]

    async def read(self, engine: "Engine") -> None:
        """Reads all adapters for the engine of the model, which was loaded just now. It takes seconds.

        Raises ModelLoadError for one of LORA_ADAPTERS; another one that cannot be read any more is served no longer.
        """
        if len(self._configured) > self._most:
            raise ModelLoadError(
                f"LORA_ADAPTERS names {len(self._configured)} adapters, and MAX_LORA_ADAPTERS is {self._most}: "
                "raise it."
            )
        async with self._changing:
            self._served = {}
            for name, path in list(self._paths.items()):
                if not self._is_usable(name):
                    raise ModelLoadError(f"LORA_ADAPTERS: {_bad_name(name)}")
                try:
                    adapter = await in_daemon_thread(partial(self._read, engine, name, path))
                except ModelLoadError as error:
                    if name in self._configured:
                        raise
                    log.warning("the adapter %s is served no longer: %s", name, error)
                    self._forget(name)
                else:
                    if name in self._paths:  # nobody has unloaded it meanwhile
                        self._served[name.casefold()] = adapter

    def _is_usable(self, name: str) -> bool:
        return name.casefold() not in self._taken and _NAME.fullmatch(name) is not None

    def _read(self, engine: "Engine", name: str, path: Path) -> "Adapter":
        from engine.build import model_runner_of

        return model_runner_of(engine).adapters.read(name, path, self._max_rank)

    async def load(self, engine: "Engine", request: LoadAdapterRequest) -> None:
        """Reads an adapter, which serves requests from then on. Raises APIError."""
        name, path = request.lora_name, request.lora_path
        if not name or not path:
            raise InvalidRequest("Both lora_name and lora_path must be provided.", param="lora_name")
        if not self._is_usable(name):
            raise InvalidRequest(_bad_name(name), param="lora_name", code="invalid_value")
        directory = self._allowed(path)
        async with self._changing:
            self._check_new(name, bool(request.load_inplace))
            try:
                adapter = await in_daemon_thread(lambda: self._read(engine, name, directory))
            except ModelLoadError as error:
                raise InvalidRequest(str(error), param="lora_path", code="model_not_supported") from error
            self._forget(name)
            self._paths[name], self._served[name.casefold()] = directory, adapter

    def _check_new(self, name: str, may_replace: bool) -> None:
        is_there = self.serves(name)
        if is_there and not may_replace:
            raise InvalidRequest(
                f"The adapter {name!r} is loaded already: set load_inplace to true to load it again.",
                param="lora_name",
                code="invalid_value",
            )
        if not is_there and len(self._paths) >= self._most:
            raise InvalidRequest(
                f"{self._most} adapters are loaded, which is the limit (MAX_LORA_ADAPTERS): unload one of them.",
                param="lora_name",
                code="limit_reached",
            )

    def _allowed(self, path: str) -> Path:
        """Returns the directory of an adapter that may be loaded: one below LORA_DIR, or one of LORA_ADAPTERS.

        Clients must not learn what other files there are, so all other paths get the same answer."""
        if "\0" not in path:
            for directory in self._configured.values():
                if path in (str(directory), str(directory.absolute())):
                    return directory
        if self._folder is None:
            raise InvalidRequest(
                "This server loads only the adapters of LORA_ADAPTERS: set LORA_DIR to a directory with others.",
                param="lora_path",
                code="not_allowed",
            )
        folder = self._folder.resolve()
        try:
            directory = (folder / path).resolve()
            is_there = directory.is_relative_to(folder) and directory != folder and directory.is_dir()
        except (OSError, ValueError, RuntimeError):  # no path, or links that end nowhere
            is_there = False
        if not is_there:
            raise _not_found(f"There is no adapter {path!r} below LORA_DIR.", "lora_path")
        return directory

    def unload(self, name: str | None) -> None:
        """Forgets an adapter; requests that run keep it until they end. Raises APIError."""
        if not name:
            raise InvalidRequest("lora_name must be provided.", param="lora_name")
        if not self._forget(name):
            raise _not_found(f"The adapter {name!r} cannot be found.", "lora_name")

    def _forget(self, name: str) -> bool:
        """Forgets an adapter; returns whether there was one of that name, in any case."""
        self._served.pop(name.casefold(), None)
        known = [other for other in self._paths if other.casefold() == name.casefold()]
        for other in known:
            del self._paths[other]
        return bool(known)


def _bad_name(name: str) -> str:
    return (
        f"{name!r} cannot be the name of an adapter: use letters, digits and . _ - : @ +, at most 200 of them, "
        "and not the name of the model."
    )


def _not_found(sentence: str, param: str) -> APIError:
    return ModelNotFound(sentence, param=param)
