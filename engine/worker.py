"""Worker: the thread that computes. Other threads send it commands through its inbox, and never touch what it owns."""

import asyncio
import math
import queue
import threading
import time
from collections.abc import Callable

POLL = 0.02  # seconds


class Worker:
    """One thread that carries out commands, and computes step by step while there is something to compute."""

    def __init__(
        self,
        name: str,
        has_work: Callable[[], object],
        step: Callable[[], object],
        on_end: Callable[[BaseException | None], object],
    ) -> None:
        """All three are called on the thread.

        has_work: tells whether there is something to compute; while there is not, the thread sleeps until the next
        command. step: computes a part of it; commands wait until it returns. on_end: gets the error that escaped a step
        or a command and so ended the thread; None after `close`.
        """
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._is_stopped = False
        # as arguments, which the thread forgets at its end: the worker does not keep its owner in memory
        self._thread = threading.Thread(target=self._run, args=(has_work, step, on_end), name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def has_commands(self) -> bool:
        """Whether commands wait for the current step to return."""
        return not self._inbox.empty()

    def post(self, command: Callable[[], object]) -> None:
        """Has the thread call `command` between two steps. May be called from any thread."""
        self._inbox.put(command)

    async def close(self, is_busy: Callable[[], object], timeout: float | None, patience: float) -> None:
        """Ends the thread.

        First waits until `is_busy` is false, for `timeout` seconds at most. Then the step that is running has
        `patience` seconds to return, after which the thread is abandoned, since the device may hang. timeout None:
        waits for both without a limit.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while is_busy() and self.is_alive and time.monotonic() < deadline:
            await asyncio.sleep(POLL)
        self.post(self._stop)
        if self.is_alive:
            await asyncio.to_thread(self._thread.join, None if timeout is None else patience)

    def _stop(self) -> None:
        self._is_stopped = True

    def _run(
        self,
        has_work: Callable[[], object],
        step: Callable[[], object],
        on_end: Callable[[BaseException | None], object],
    ) -> None:
        error: BaseException | None = None
        try:
            while not self._is_stopped:
                self._read_inbox(must_wait=not has_work())
                if not self._is_stopped and has_work():
                    step()
        except BaseException as raised:
            error = raised
        on_end(error)

    def _read_inbox(self, must_wait: bool) -> None:
        """Carries out the commands that are there; must_wait: at least one, however long it takes to come."""
        if must_wait:
            self._inbox.get()()
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            command()
