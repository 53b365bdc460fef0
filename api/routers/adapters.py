"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them."""

from fastapi import Response
from fastapi.responses import PlainTextResponse

from api.answers import ignored_fields_header
from api.routing import ERRORS, V1Router
from api.services import Services, UsesServices
from errors import InvalidRequest
from schemas import LoadAdapterRequest, UnloadAdapterRequest

_CONTENT = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}  # success is a text
router = V1Router({status: {"description": e["description"], "content": _CONTENT} for status, e in ERRORS.items()})


@router.post("/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(body: LoadAdapterRequest, services: UsesServices) -> Response:
    _check_free(body.lora_name or "", services)
    await services.chat.first.load_adapter(body)
    return _success(f"Success: LoRA adapter '{body.lora_name}' added successfully.", body.ignored_fields)


@router.post("/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(body: UnloadAdapterRequest, services: UsesServices) -> Response:
    services.chat.first.adapters.unload(body.lora_name)
    return _success(f"Success: LoRA adapter '{body.lora_name}' removed successfully.", body.ignored_fields)


def _check_free(name: str, services: Services) -> None:
    """Raises InvalidRequest for a name under which requests reach another model."""
    router = services.router
    other = services.chat.find(name)
    is_taken = services.embeddings.lists(name) or (other is not None and other is not services.chat.first)
    if is_taken or router.alias(name) != name or router.provider_of(name) is not None:
        raise InvalidRequest(f"The name {name!r} is taken by another model.", param="lora_name", code="invalid_value")


def _success(sentence: str, ignored: list[str]) -> PlainTextResponse:
    return PlainTextResponse(sentence, headers=ignored_fields_header(ignored))
