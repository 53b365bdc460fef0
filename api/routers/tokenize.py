"""POST /tokenize and /detokenize, and GET /tokenizer_info."""

from fastapi import Response

from api.answers import ignored_fields_header
from api.routing import ERRORS, RootRouter
from api.services import UsesServices
from schemas import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse, TokenizerInfo

router = RootRouter(responses=ERRORS)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, response: Response, services: UsesServices) -> TokenizeResponse:
    response.headers.update(ignored_fields_header(body.ignored_fields))
    return await services.local.tokenize(body)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, response: Response, services: UsesServices) -> DetokenizeResponse:
    response.headers.update(ignored_fields_header(body.ignored_fields))
    return await services.local.detokenize(body)


@router.get("/tokenizer_info")
async def read_tokenizer_info(services: UsesServices) -> TokenizerInfo:
    return services.local.tokenizer_info
