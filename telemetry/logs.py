"""Logs: plain lines or JSON, one line per request, and no way for what a client sent to look like a line of its own."""

import json
import logging
import re
from typing import Any

from telemetry.request_record import RequestRecord

access = logging.getLogger("access")
_BARE = re.compile(r"[A-Za-z0-9_.,:/@+-]+")  # what ends neither a value nor a line


def escaped(text: str) -> str:
    """Without what is not seen, or changes how the rest is seen."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def log_value(value: Any) -> str:
    """A value of a plain line, as one word or as a JSON string, so that none looks like the next field."""
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text)


class PlainFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return escaped(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        """Set in, so that no line of a message in it looks like one of the log's own."""
        return "\n".join(f"  {escaped(line)}" for line in super().formatException(ei).split("\n"))


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


FORMATTERS = {"plain": PlainFormatter, "json": JsonFormatter}
FIRST = ("method", "path", "status")  # in a plain line, without their names
QUIET = ("httpx2", "sentence_transformers")  # they write a line for each request of theirs
UVICORN = ("uvicorn", "uvicorn.error", "uvicorn.access")


def configure(level: str, kind: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(FORMATTERS[kind]())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in UVICORN:  # its own handlers write what clients sent as it came
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"  # that one logs query strings


def write(record: RequestRecord, method: str, path: str, status: int) -> None:
    """The line of a request that is over."""
    fields: dict[str, Any] = {
        "request_id": record.request_id,
        "method": method,
        "path": path[:200],
        "status": status,
        "seconds": round(record.seconds, 4),
        "client": record.client,
        "provider": record.provider,
        "model": record.model[:200],
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "queue_seconds": None if record.queue_time is None else round(record.queue_time, 4),
        "first_token_seconds": None if record.first_token is None else round(record.first_token, 4),
        "finish_reason": ",".join(sorted(set(record.finish_reasons))),
        "error": record.error,
    }
    known = {name: value for name, value in fields.items() if value not in ("", None, 0) or name == "status"}
    line = " ".join(f"{name}={log_value(value)}" for name, value in known.items() if name not in FIRST)
    access.info("%s %s %d %s", log_value(method), log_value(path[:200]), status, line, extra={"fields": known})
