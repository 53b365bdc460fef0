"""Replicas of the server on Ray Serve, on one machine or many: `python -m deploy.ray_serve`.

Every replica is the whole server, with its model. Ray's proxy listens on HOST and PORT and passes each request to one
of them; Ray starts and ends replicas as the requests in progress rise and fall, and replaces those that are unhealthy.
`serve run deploy.ray_serve:application max=4` does the same on a cluster that runs, at the address of `serve start`.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Literal

import ray
from fastapi import FastAPI
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.services import services_of
from config import Settings
from main import create_app

ROOT = Path(__file__).resolve().parents[1]

# The beginning of a conversation is in the cache of the replica that answered its last turn. Ray has two routers for
# that:
#
# * PrefixCacheAffinityRouter (ray.serve.llm) cannot route to an ASGI ingress. It reads `prompt` or `messages` off the
#   arguments of a call between deployments, while the proxy calls an ingress with the pickled head of the request, the
#   body being fetched by the replica later: it raises a ValueError for each. It would need a second deployment in front
#   that parses every body and sends every chunk of a stream through one more process, and ray[llm] with its pyarrow.
# * ConsistentHashRouter (alpha) needs a header alone: requests of one x-session-id go to one replica, or to the next
#   where that one is full. RAY_SERVE_SESSION_ID_HEADER_KEY names another header, such as Open WebUI's
#   x-openwebui-chat-id. Requests without it are spread evenly. That is "session".
ROUTERS = {
    "load": RequestRouterConfig(),  # of two replicas at random, the one that has less to do
    "session": RequestRouterConfig(
        request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
    ),
}


class Replicas(BaseSettings):
    """The number and size of replicas: from REPLICAS_MAX=4 and the like, or max=4 to `serve run`."""

    model_config = SettingsConfigDict(env_prefix="REPLICAS_", extra="forbid")

    min: int = Field(1, ge=1, description="minimum number of replicas")
    max: int = Field(2, ge=1, description="maximum number of replicas")
    target: float = Field(8, gt=0, description="target number of requests in progress per replica, for autoscaling")
    ongoing: int = Field(
        64, gt=0, description="maximum number of requests in progress per replica; more wait at the proxy"
    )
    waiting: int = Field(
        1024, gt=0, description="maximum number of requests that wait at the proxy; more get a 503 with Retry-After"
    )
    cpus: float = Field(1, gt=0, description="number of the cluster's CPU cores per replica, and of its threads")
    gpus: float = Field(0, ge=0, description="number of the cluster's GPUs per replica")
    routing: Literal["load", "session"] = Field("load", description="session: a conversation stays on one replica")


class ServedBy:
    """Adds a header with the replica that answered."""

    def __init__(self, app: ASGIApp, replica: str) -> None:
        self.app = app
        self.replica = replica

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-served-by"] = self.replica
                del headers["x-request-id"]  # Ray's proxy adds it once more
            await send(message)

        await self.app(scope, receive, send_named)


def replica_app(settings: Settings) -> FastAPI:
    """Returns the server's app. Its start lasts until the model is loaded, so that no request comes before."""
    app = create_app(settings, stop=lambda: None)
    app.add_middleware(ServedBy, replica=serve.get_replica_context().replica_id.unique_id)
    lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def until_loaded(app: FastAPI) -> AsyncIterator[None]:
        async with lifespan(app):
            model = services_of(app).local
            while not model.health[0]:
                if model.failure:
                    raise RuntimeError(model.failure)
                await asyncio.sleep(0.1)
            yield

    app.router.lifespan_context = until_loaded
    return app


class Server:
    """The class that Ray runs in a replica, with its health check."""

    app: FastAPI  # Ray's ingress sets it

    def check_health(self) -> None:
        is_healthy, report = services_of(self.app).local.health
        if not is_healthy:
            raise RuntimeError(str(report))


def application(replicas: Replicas) -> Application:
    """Returns the application for `serve run`. All machines take the settings of the process that starts it."""
    settings = Settings()

    def build() -> FastAPI:
        return replica_app(settings)

    deployment = serve.deployment(
        serve.ingress(build)(Server),
        name="gemma3-server",
        max_ongoing_requests=replicas.ongoing,
        max_queued_requests=replicas.waiting,
        backpressure_config=BackpressureConfig(retry_after_s=5),
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas.min, max_replicas=replicas.max, target_ongoing_requests=replicas.target
        ),
        request_router_config=ROUTERS[replicas.routing],
        graceful_shutdown_timeout_s=settings.shutdown_timeout + 5,
        ray_actor_options={
            "num_cpus": replicas.cpus,
            "num_gpus": replicas.gpus,
            "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}},  # the same path on every machine
        },
    )
    return deployment.bind()


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


def main() -> None:
    """Serves until SIGTERM or Ctrl-C, on the cluster of RAY_ADDRESS or else on a new one."""
    settings = Settings()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(include_dashboard=False)
    serve.start(http_options={"host": settings.host, "port": settings.port})
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    try:
        serve.run(application(Replicas()))
        while True:
            time.sleep(1)
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
