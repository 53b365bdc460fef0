"""Logs: plain lines or JSON, one line per request; text from clients is escaped, so that it cannot forge lines."""

import json
import logging
import re
from typing import Any

from telemetry.request_record import RequestRecord

access = logging.getLogger("access")
_BARE = re.compile(r"[A-Za-z0-9_.,:/@+-]+")  # characters that end neither a value nor a line


def escaped(text: str) -> str:
    """Escapes the characters that are invisible or that change how others are shown."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def log_value(value: Any) -> str:
    """Writes a value as one word or as a JSON string, so that it cannot look like the next field of a plain line."""
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text)


class PlainFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return escaped(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        """Indents the traceback, so that no line of it looks like a line of the log."""
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
FIRST = ("method", "path", "status")  # a plain line begins with these, without their names
QUIET = ("httpx2", "sentence_transformers")  # they log a line for each request that they send
UVICORN = ("uvicorn", "uvicorn.error", "uvicorn.access")


def configure(level: str, log_format: str) -> None:
    """Sets up the root logger. log_format: "plain" or "json"."""
    handler = logging.StreamHandler()
    handler.setFormatter(FORMATTERS[log_format]())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in UVICORN:  # its own handlers do not escape text from clients
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"  # that one logs query strings


def write(record: RequestRecord, method: str, path: str, status: int) -> None:
    """Logs the line of a request that has ended."""
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
    filled = {name: value for name, value in fields.items() if value not in ("", None, 0) or name == "status"}
    line = " ".join(f"{name}={log_value(value)}" for name, value in filled.items() if name not in FIRST)
    access.info("%s %s %d %s", log_value(method), log_value(path[:200]), status, line, extra={"fields": filled})
