"""Adds every router in api/routers/ to the app, so that a new endpoint is a new file there and no change here."""

from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules

from fastapi import FastAPI

import api.routers
from api.routing import RootRouter

# The order of the groups at /docs; those that are not listed follow by name
ORDER = ("chat", "completions", "responses", "embeddings", "rerank", "models", "tokenize", "health")


def add_endpoints(app: FastAPI) -> None:
    """Adds all endpoints, each under the prefixes of its router."""
    for router in routers():
        documented, *others = router.prefixes
        app.include_router(router, prefix=documented)
        for prefix in others:
            app.include_router(router, prefix=prefix, include_in_schema=False)


def routers() -> Iterator[RootRouter]:
    """Yields all routers, in the order of their groups."""
    names = {module.name for module in iter_modules(api.routers.__path__)}
    for name in sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name)):
        yield import_module(f"{api.routers.__name__}.{name}").router
