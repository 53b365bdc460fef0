"""ResponsesEncoder: the events of a response as server-sent events."""

from api.responses.progress import problem_of
from api.responses.schemas import ErrorEvent, ResponseObject, ResponsesEvent, ResponseStateEvent
from errors import APIError
from server.events import EVENTS, encode_event


class ResponsesEncoder:
    """Writes the named events of Responses. An error is one of them, and a failed response follows it."""

    format = EVENTS

    def __init__(self) -> None:
        self._number = -1  # of the last event that was sent
        self._response: ResponseObject | None = None

    def event(self, item: ResponsesEvent) -> bytes:
        encoded = encode_event(item.model_dump_json(), item.type)  # which fails for what JSON cannot hold
        self._number = item.sequence_number
        if isinstance(item, ResponseStateEvent):
            self._response = item.response
        return encoded

    def failure(self, error: APIError) -> bytes:
        number = self._number + 1
        event = ErrorEvent(sequence_number=number, message=error.message, code=error.code, param=error.param)
        if self._response is None:
            return self.event(event)
        failed = self._response.model_copy(update={"status": "failed", "error": problem_of(error)})
        last = ResponseStateEvent(type="response.failed", sequence_number=number + 1, response=failed)
        return self.event(event) + self.event(last)

    def end(self) -> bytes:
        return b""
