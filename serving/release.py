"""Release: what a model took is given back, also what a load that failed has left behind."""

import asyncio
import gc

from engine import memory
from serving.loading import LoadedModel


async def close(loaded: LoadedModel, timeout: float | None) -> None:
    """Ends the model's engine, whose requests get `timeout` seconds to finish."""
    await loaded.engine.close(timeout or 0.0)


async def reclaim() -> None:
    """Frees the memory of models that nothing refers to any more. It takes a part of a second."""
    await asyncio.to_thread(_collect)


def _collect() -> None:
    """Frees objects that refer to each other, and were frozen when they were loaded."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    memory.trim()


def without_frames(error: BaseException) -> None:
    """Forgets where an error came from: these frames hold what was loaded so far."""
    seen: set[int] = set()
    rest = [error]
    while rest:
        each = rest.pop()
        if id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            rest += [other for other in (each.__cause__, each.__context__) if other is not None]
