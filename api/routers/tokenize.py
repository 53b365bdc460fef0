"""POST /tokenize and /detokenize, and GET /tokenizer_info."""

from fastapi import Response

from api.answers import ignored_fields_header
from api.routing import ERRORS, RootRouter
from api.services import Services, UsesServices
from schemas import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse, TokenizerInfo
from serving.local import LocalModel

router = RootRouter(responses=ERRORS)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, response: Response, services: UsesServices) -> TokenizeResponse:
    response.headers.update(ignored_fields_header(body.ignored_fields))
    return await (await _model(services, body.model)).tokenize(body)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, response: Response, services: UsesServices) -> DetokenizeResponse:
    response.headers.update(ignored_fields_header(body.ignored_fields))
    return await (await _model(services, body.model)).detokenize(body)


@router.get("/tokenizer_info")
async def read_tokenizer_info(services: UsesServices, model: str | None = None) -> TokenizerInfo:
    return await (await _model(services, model)).tokenizer_info()


async def _model(services: Services, name: str | None) -> LocalModel:
    """Returns the model of that name; the first one if there is none."""
    return services.chat.first if name is None else await services.text_model(name)
