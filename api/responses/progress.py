"""ResponseProgress: a response as far as its events have told, whatever ends it."""

import time

from api.responses.schemas import OutputItem, OutputItemEvent, ResponseObject, ResponsesEvent, ResponseStateEvent
from errors import APIError

OVER = ("completed", "incomplete", "failed", "cancelled")
INVALID, LIMITED = range(400, 429), (429,)  # HTTP statuses


class ResponseProgress:
    def __init__(self, response: ResponseObject) -> None:
        """response: as the request opens it."""
        self.response = response
        self.has_begun = False
        self._items: list[OutputItem] = []  # complete ones

    @property
    def is_over(self) -> bool:
        return self.response.status in OVER

    def add(self, event: ResponsesEvent) -> None:
        self.has_begun = True
        if isinstance(event, ResponseStateEvent):
            self.response = event.response
        elif isinstance(event, OutputItemEvent) and event.type == "response.output_item.done":
            self._items.append(event.item)
            self.response = self.response.model_copy(update={"output": [*self._items]})

    def fail(self, error: APIError) -> None:
        self._end("failed", problem_of(error))

    def cancel(self) -> None:
        self._end("cancelled", None)

    def _end(self, status: str, problem: dict[str, str] | None) -> None:
        if not self.is_over:
            changes = {"status": status, "error": problem, "completed_at": int(time.time())}
            self.response = self.response.model_copy(update=changes)


def problem_of(error: APIError) -> dict[str, str]:
    """Returns the `error` of a response that failed; its codes are OpenAI's few."""
    code = "rate_limit_exceeded" if error.status in LIMITED else "server_error"
    return {"code": "invalid_prompt" if error.status in INVALID else code, "message": error.message}
