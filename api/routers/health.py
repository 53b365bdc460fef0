"""GET /metrics, /version and /health."""

import asyncio

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from api.routing import RootRouter
from api.services import UsesServices
from telemetry.metrics import CONTENT_TYPE

router = RootRouter()


@router.get("/metrics", response_class=Response)
async def read_metrics(services: UsesServices) -> Response:
    return Response(await asyncio.to_thread(services.metrics.text), media_type=CONTENT_TYPE)


@router.get("/version")
async def version(request: Request) -> dict[str, str]:
    return {"version": request.app.version}


@router.head("/health", include_in_schema=False)
@router.get("/health", responses={503: {"description": "The model is loading, or failed"}})
async def health(services: UsesServices) -> JSONResponse:
    is_healthy, report = services.chat.health
    providers = services.router.health
    return JSONResponse({**report, "providers": providers} if providers else report, 200 if is_healthy else 503)
