"""What can go wrong, as exceptions: each knows its HTTP status and its OpenAI `type`, `code` and `param`.

It does not know HTTP responses: `main.py` maps these to one, in a single place.
Source of the shape: the `Error` schema of the OpenAI OpenAPI document (message, type, param, code, all required).
"""

from collections.abc import Mapping


class APIError(Exception):
    """An error that a client is told about."""

    status = 500
    type = "server_error"
    code: str | None = None
    headers: Mapping[str, str] = {}  # of the answer that says so
    is_passing = False  # another try, or another model, may succeed

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = _whole(message)
        self.param = param and _whole(param)
        self.code = _whole(code) if code else type(self).code
        self.retry_after = retry_after  # seconds


def _whole(text: str) -> str:
    """Without half characters, which JSON can name and UTF-8 cannot say."""
    return text.encode(errors="replace").decode()


class InvalidRequest(APIError):
    """The request is wrong; sending it again will not help."""

    status = 400
    type = "invalid_request_error"


def unsupported(param: str) -> InvalidRequest:
    """For a field, or a value of it, that cannot be honoured."""
    return InvalidRequest(
        f"{param}, or the value that it has, is not supported: change it or leave it out.",
        param=param,
        code="unsupported_value",
    )


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer do not fit the model's context; clients look for the sentence, LangChain for the code in it."""

    code = "context_length_exceeded"


class ModelNotFound(InvalidRequest):
    status = 404
    code = "model_not_found"


class NotFound(InvalidRequest):
    status = 404


class MethodNotAllowed(InvalidRequest):
    status = 405


class InvalidKey(APIError):
    """Who calls is not known here."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"
    headers = {"WWW-Authenticate": "Bearer"}


class RateLimited(APIError):
    status = 429
    type = "rate_limit_exceeded"
    code = "rate_limit_exceeded"


class RequestTimeout(APIError):
    """The answer took longer than it may."""

    status = 504
    type = "timeout"
    code = "request_timeout"
    headers = {"x-should-retry": "false"}  # it would take as long again


class Unavailable(APIError):
    """Nothing is wrong with the request, but not now; `retry_after` says when."""

    status = 503


class ModelLoading(Unavailable):
    code = "model_loading"


class Overloaded(Unavailable):
    code = "server_is_overloaded"


class UpstreamUnreachable(APIError):
    """Another machine that the answer depends on cannot be reached."""

    status = 502
    code = "upstream_unreachable"


class EngineFailure(APIError):
    """A step of the engine failed; the requests that it carried get this."""


class ProviderNotConfigured(APIError):
    """The key of a model's provider is not set here."""

    status = 401
    type = "authentication_error"
    code = "provider_not_configured"


class UpstreamError(APIError):
    """What a provider answered, or why there is no answer of it."""

    type = "upstream_error"

    def __init__(
        self,
        message: str,
        *,
        status: int = 502,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
        is_passing: bool = False,
    ) -> None:
        super().__init__(message, param=param, code=code, retry_after=retry_after)
        self.status, self.headers, self.is_passing = status, dict(headers or {}), is_passing
        self.type = type or UpstreamError.type


class ModelLoadError(Exception):
    """The model cannot be served; one sentence for the person who started the server."""


class NotOnHub(ModelLoadError):
    """The Hub answers, and does not give the model."""


class SourceUnreachable(ModelLoadError):
    """What has the model's files, the Hub say, cannot be asked for them."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its class if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
