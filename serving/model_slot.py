"""ModelSlot: a model that is loaded once, in the background, for everyone who waits for it."""

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, Generic, TypeVar

from errors import ModelLoading, Unavailable

log = logging.getLogger(__name__)
RETRY_AFTER = 5  # seconds after which those come again who were told that the model loads
GRACE = 5.0  # seconds more
M = TypeVar("M")
T = TypeVar("T")


class ModelSlot(Generic[M]):
    """`load` makes the model; the slot keeps it, or the error, and knows who uses it."""

    def __init__(
        self, name: str, load: Callable[[], Coroutine[Any, Any, M]], progress: Callable[[], str] = lambda: ""
    ) -> None:
        """progress: says in brackets how far the load is."""
        self.name, self.progress = name, progress
        self.created = int(time.time())
        self.num_users = 0
        self.idle_limit: float | None = None  # seconds without users after which it may go; None: not said
        self._load = load
        self._loading: asyncio.Task[M] | None = None
        self._used_at = time.monotonic()
        self._has_put_off = False  # whether somebody was told to come again
        self.awaited_until = -math.inf  # time.monotonic() until which it is not to go, since those have not come yet

    def start(self) -> asyncio.Task[M]:
        """Begins to load, unless the model is loading or loaded; an earlier failure is forgotten."""
        if self._loading is None or self.has_failed:
            self._loading = asyncio.create_task(self._timed_load())
            self._loading.add_done_callback(_retrieve)
        return self._loading

    async def _timed_load(self) -> M:
        begin = time.monotonic()
        model = await self._load()
        self.touch()
        if self._has_put_off:
            self.awaited_until = time.monotonic() + RETRY_AFTER + GRACE
        log.info("%s is ready after %.1f s", self.name, time.monotonic() - begin)
        return model

    @property
    def is_loading(self) -> bool:
        return self._loading is not None and not self._loading.done()

    @property
    def has_failed(self) -> bool:
        """Whether the last load raised an error or was cancelled."""
        task = self._loading
        return task is not None and task.done() and (task.cancelled() or task.exception() is not None)

    @property
    def model(self) -> M | None:
        """The model, or None until it is loaded."""
        if self._loading is None or self.is_loading or self.has_failed:
            return None
        return self._loading.result()

    async def wait(self, patience: float | None = None) -> M:
        """Returns the model as soon as it is loaded; every caller waits for the same load.

        Raises ModelLoading after `patience` seconds (None: never), Unavailable if the load was cancelled, and the
        load's own error, which is remembered until the next `start`.
        """
        assert self._loading is not None, "start() comes first"
        loading = self._loading
        await asyncio.wait({loading}, timeout=patience)
        if not loading.done():
            self._has_put_off = True
            raise ModelLoading(
                f"The model {self.name} is loading{self.progress()}; try again later.", retry_after=RETRY_AFTER
            )
        if loading.cancelled():
            raise Unavailable("The server is shutting down.", retry_after=10)
        self.touch()
        self.awaited_until = -math.inf
        return loading.result()

    @asynccontextmanager
    async def using(self, patience: float | None = None) -> AsyncIterator[M]:
        """Waits for the model as `wait` does, and counts as one of its users until the block ends."""
        self.num_users += 1
        try:
            yield await self.wait(patience)
        finally:
            self.num_users -= 1
            self.touch()

    def clear(self) -> None:
        """Forgets the model, which nobody uses any more."""
        self._loading = None

    @property
    def is_empty(self) -> bool:
        """Whether there is no model, and none is on its way."""
        return self._loading is None

    async def settled(self) -> None:
        """Waits until the load in progress has ended, well or not."""
        if self._loading is not None:
            await asyncio.wait({self._loading})

    def touch(self) -> None:
        """Notes that the model is used now."""
        self._used_at = time.monotonic()

    def is_idle(self, seconds: float) -> bool:
        """Returns whether the model has no users, and was not used in the last `seconds`."""
        return not self.num_users and time.monotonic() - self._used_at >= seconds

    def expires_in(self, default: float | None) -> float:
        """Returns the seconds until the model is idle for too long, if nobody uses it. default: the limit where none
        was said; None: it stays."""
        limit = default if self.idle_limit is None else self.idle_limit
        return math.inf if limit is None else max(0.0, self._used_at + limit - time.monotonic())

    async def cancel(self) -> None:
        """Ends a load that is in progress; those who wait for it get Unavailable."""
        if self._loading is not None and not self._loading.done():
            self._loading.cancel()
            await asyncio.wait({self._loading})


def _retrieve(task: "asyncio.Task[Any]") -> None:
    """Keeps asyncio from logging an error that no request waited for."""
    if not task.cancelled():
        task.exception()


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """Calls `work` in a thread that does not keep the process from ending: loading can take minutes."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(finish: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            finish(value)

    def run() -> None:
        try:
            outcome: tuple[Callable[[Any], None], Any] = (future.set_result, work())
        except Exception as error:
            outcome = (future.set_exception, error)
        with suppress(RuntimeError):  # the loop is closed, so there is no one left to tell
            loop.call_soon_threadsafe(deliver, *outcome)

    thread = threading.Thread(target=run, name="loader", daemon=True)
    thread.start()
    try:
        return await future
    finally:
        if not future.cancelled():
            thread.join()  # it is at its end, and holds what it worked with until then
