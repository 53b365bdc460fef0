"""The errors of the server, as exceptions.

    Exception
      APIError                    a client gets it; 500 where no other status is given
        InvalidRequest            400
          ContextLengthExceeded
          ThreadsUnsupported
          ModelNotFound           404
          NotFound                404
          MethodNotAllowed        405
          NotServed               501
        InvalidKey                401
        ProviderNotConfigured     401
        RateLimited               429
        UpstreamUnreachable       502
        UpstreamError             502, or the status that follows from the provider's
        Unavailable               503
          ModelLoading
          Overloaded
        RequestTimeout            504
        EngineFailure             500
      ModelLoadError              whoever started the server gets it, or the client whose request loads the model
        NotOnHub
        SourceUnreachable

Each APIError has an HTTP status and the `type`, `code` and `param` of OpenAI's protocol. How it is written on the wire
is in server/error_formats.py, and which response it becomes in api/error_handlers.py.
"""

from collections.abc import Mapping


class APIError(Exception):
    """An error that is sent to a client."""

    status = 500
    type = "server_error"
    code: str | None = None
    headers: Mapping[str, str] = {}  # of the response
    is_transient = False  # whether another attempt, or another model, may succeed

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = _encodable(message)
        self.param = param and _encodable(param)
        self.code = _encodable(code) if code else type(self).code
        self.retry_after = retry_after  # seconds


def _encodable(text: str) -> str:
    """Replaces unpaired surrogates, which JSON can escape but UTF-8 cannot encode."""
    return text.encode(errors="replace").decode()


class InvalidRequest(APIError):
    """The request is wrong; sending it again will not help."""

    status = 400
    type = "invalid_request_error"


def unsupported(param: str) -> InvalidRequest:
    """Makes the error for a field, or a value of it, that is not supported."""
    return InvalidRequest(
        f"{param}, or the value that it has, is not supported: change it or leave it out.",
        param=param,
        code="unsupported_value",
    )


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer do not fit the model's context.

    Clients recognise it by the sentence; LangChain by the code in the sentence; Claude Code by the two counts.
    """

    code = "context_length_exceeded"
    counts: tuple[int, int] | None = None  # tokens of the prompt, and how many the context has


class ThreadsUnsupported(InvalidRequest):
    """The server is to hold a conversation of the Messages API. Anthropic's SDK recognises the code in the error's
    details, and sends whole conversations from then on."""

    code = "thread_unsupported_request"


class ModelNotFound(InvalidRequest):
    status = 404
    code = "model_not_found"


class NotFound(InvalidRequest):
    status = 404


class MethodNotAllowed(InvalidRequest):
    status = 405


class NotServed(InvalidRequest):
    """The endpoint exists in the protocol, and not in this server."""

    status = 501
    code = "not_served"


class InvalidKey(APIError):
    """The request has no valid API key."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"
    headers = {"WWW-Authenticate": "Bearer"}


class RateLimited(APIError):
    status = 429
    type = "rate_limit_exceeded"
    code = "rate_limit_exceeded"


class RequestTimeout(APIError):
    """The answer took longer than the request's or the server's limit."""

    status = 504
    type = "timeout"
    code = "request_timeout"
    headers = {"x-should-retry": "false"}  # it would take as long again


class Unavailable(APIError):
    """The request is fine but cannot be answered now; `retry_after` says when it can."""

    status = 503


class ModelLoading(Unavailable):
    code = "model_loading"


class Overloaded(Unavailable):
    code = "server_is_overloaded"


class UpstreamUnreachable(APIError):
    """A machine that the answer depends on cannot be reached."""

    status = 502
    code = "upstream_unreachable"


class EngineFailure(APIError):
    """A step of the engine failed; every request in the step gets this error."""


class ProviderNotConfigured(APIError):
    """The API key of the model's provider is not set on this server."""

    status = 401
    type = "authentication_error"
    code = "provider_not_configured"


class UpstreamError(APIError):
    """The error that a provider answered with, or the reason why it gave no valid answer."""

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
        is_transient: bool = False,
    ) -> None:
        super().__init__(message, param=param, code=code, retry_after=retry_after)
        self.status, self.headers, self.is_transient = status, dict(headers or {}), is_transient
        self.type = type or UpstreamError.type


class ModelLoadError(Exception):
    """The model cannot be loaded. The message is one sentence for the person who started the server.

    If a request asked for the model (huggingface/, embeddings), serving.loading.to_api_error sends it to the client.
    """


class NotOnHub(ModelLoadError):
    """The Hub is reachable but refuses the model, or does not have it."""


class SourceUnreachable(ModelLoadError):
    """The source of the model's files, such as the Hub, cannot be reached."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, or the name of its class if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
