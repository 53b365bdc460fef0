"""The app and its process: `python main.py` or `uvicorn main:app` starts it."""

import argparse
import asyncio
import logging
import math
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from pydantic import ValidationError

from api.endpoints import add_endpoints
from api.error_handlers import VALUE_ERROR, add_error_handlers
from api.responses.store import StoreFailure
from api.routers.page import FILES as PAGE
from api.services import Services, services_of
from config import LOCAL_ORIGINS, Settings, from_command_line, is_open_to_network
from engine import memory
from server.api_keys import ApiKeyAuth
from server.body_limit import BodyLimit
from server.deadline import Shutdown, TimeLimit
from server.http_protocol import with_bounds
from server.observer import Observer
from server.request_id import RequestId
from server.shutdown import SignalDrain
from serving.loading import LoadModel, load
from telemetry import logs, tracing

log = logging.getLogger("main")


def create_app(settings: Settings, stop: Callable[[], None] | None = None, load: LoadModel = load) -> FastAPI:
    """Makes the application. `load` loads its model; if that fails, `stop` ends the process."""

    def on_failure(sentence: str) -> None:
        print(f"\nerror: {sentence}", file=sys.stderr, flush=True)
        (stop or _terminate)()

    try:
        services, shutdown = Services.of(settings, on_failure, load), Shutdown()
    except StoreFailure as error:
        sys.exit(f"error: {error}")
    app = FastAPI(
        title="Gemma 3 / Qwen server",
        version="0.1.0",
        lifespan=_lifespan(services, shutdown),
        telemetry=tracing.configuration(),
        redirect_slashes=False,
    )
    app.state.services = services
    _add_middleware(app, services, shutdown)
    add_error_handlers(app)
    add_endpoints(app)
    return app


def _lifespan(services: Services, shutdown: Shutdown) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    settings = services.settings

    async def drain(timeout: float) -> None:
        """Gives the requests in progress `timeout` seconds to finish, and refuses new ones."""
        asyncio.get_running_loop().call_later(timeout, shutdown.begin)
        await services.close_models(timeout)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        logs.configure(settings.log_level, settings.log_format)
        _warn_if_open(settings)
        if settings.hf_token is not None:  # huggingface_hub reads the environment, and not .env
            os.environ.setdefault("HF_TOKEN", settings.hf_token.get_secret_value())
        SignalDrain(drain, settings.shutdown_timeout).install()
        services.start()
        yield
        await drain(settings.shutdown_timeout)
        await services.close()

    return lifespan


def _add_middleware(app: FastAPI, services: Services, shutdown: Shutdown) -> None:
    """Adds what every request passes; the last one added sees it first."""
    settings = services.settings
    app.add_middleware(
        BodyLimit,
        max_body_size=settings.max_body_size,
        max_body_memory=settings.max_body_memory,
        on_release=memory.trim_after,
    )
    app.add_middleware(TimeLimit, seconds=settings.request_timeout, shutdown=shutdown)
    app.add_middleware(ApiKeyAuth, keys=settings.api_keys, open_paths=PAGE)
    _add_cors(app, settings)  # what is added later runs earlier: a browser's preflight request carries no key
    app.add_middleware(Observer, metrics=services.metrics, span=tracing.span())
    app.add_middleware(RequestId, secrets=[key.secret.get_secret_value() for key in settings.api_keys])


def _add_cors(app: FastAPI, settings: Settings) -> None:
    """Lets web pages of the allowed origins call the server; by default those of this machine."""
    origins = settings.cors_allow_origins
    allowed: dict[str, Any] = {"allow_origin_regex": LOCAL_ORIGINS} if origins is None else {"allow_origins": origins}
    app.add_middleware(CORSMiddleware, **allowed, allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"])


# --- the process


def _warn_if_open(settings: Settings) -> None:
    host = _listening_host(settings)
    if is_open_to_network(host) and not settings.api_keys:
        log.warning(
            "HOST=%s: anyone who reaches this address can use the model, because there is no key: set API_KEYS", host
        )


def _listening_host(settings: Settings) -> str:
    """Returns the address to listen on, which `uvicorn main:app --host H` or UVICORN_HOST may set instead of the
    settings."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default=os.environ.get("UVICORN_HOST", settings.host))
    return str(parser.parse_known_args()[0].host)


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def main(load: LoadModel = load) -> None:
    """Serves until a signal; exits with status 1 and a sentence if the model cannot be served."""
    _run_command()
    settings = _settings_or_exit(from_command_line)
    logs.configure(settings.log_level, settings.log_format)
    _allow_many_files()
    app = create_app(settings, lambda: setattr(server, "should_exit", True), load)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        log_level=settings.log_level,
        http=with_bounds(settings),
        timeout_keep_alive=75,  # clients close idle connections earlier, so that no request meets a closing one
        timeout_graceful_shutdown=math.ceil(settings.shutdown_timeout) + 5,  # the drain comes first
    )
    server = uvicorn.Server(config)
    connections = server.server_state.connections
    services_of(app).metrics.gauge("http_connections", "Open connections", lambda: len(connections))
    # uvicorn raises its signals again at its end: they are ignored
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)
    _run(server)
    if services_of(app).chat.failure is not None or not server.started:
        sys.exit(1)


def _run_command() -> None:
    """Runs a command such as `pull`, and exits, if the command line begins with one; says which there are before
    --help."""
    first = next(iter(sys.argv[1:]), "")
    if first in ("pull", "list", "rm", "plan", "-h", "--help"):
        from serving import commands

        if first.startswith("-"):
            print(commands.OVERVIEW)
        else:
            sys.exit(commands.run(sys.argv[1:], _settings_or_exit(Settings)))


def _run(server: uvicorn.Server) -> None:
    """Runs the server; if it cannot listen, which uvicorn logs, the last line says what to do."""
    try:
        server.run()
    except SystemExit:
        if server.started or server.lifespan.should_exit:  # the address is not the reason
            raise
        host, port = server.config.host, server.config.port
        sys.exit(f"error: The server cannot listen on {host}:{port}: set another HOST or PORT, or stop what uses it.")


def _allow_many_files() -> None:
    """Raises the limit on open files, which is usually 1024: each connection is one."""
    if sys.platform == "win32":
        return
    import resource

    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_files = 65536 if limit == resource.RLIM_INFINITY else min(limit, 65536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, limit))


def _settings_or_exit(read: Callable[[], Settings]) -> Settings:
    try:
        return read()
    except ValidationError as error:
        problem = error.errors()[0]
        sys.exit(f"error: {str(problem['loc'][0]).upper()}: {problem['msg'].removeprefix(VALUE_ERROR)}")


def __getattr__(name: str) -> FastAPI:
    """Makes `main.app` when uvicorn asks for it, so that an import does nothing."""
    if name == "app":
        app = globals()["app"] = create_app(_settings_or_exit(Settings))
        return app
    raise AttributeError(name)


if __name__ == "__main__":
    main()
