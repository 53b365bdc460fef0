"""Values of parsed JSON: `require_...` refuses a request's value of the wrong type, `..._or_empty` passes over it."""

import math
from collections.abc import Callable, Collection
from typing import Any, NoReturn, TypeVar

from errors import InvalidRequest

Object = dict[str, Any]
T = TypeVar("T")
MAX_DEPTH = 200  # levels of nested JSON; serializers give up at about a thousand


# --- in an answer, a value that is absent or of the wrong type counts as an empty one


def object_or_empty(value: Any) -> Object:
    return value if isinstance(value, dict) else {}


def list_or_empty(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def string_or_empty(value: Any) -> str:
    return value if isinstance(value, str) else ""


def count_or_zero(value: Any) -> int:
    return value if isinstance(value, int) else 0


# --- in a request, a value of the wrong type raises InvalidRequest, which names the field `param`


def refuse(param: str, what: str, code: str = "invalid_value") -> NoReturn:
    raise InvalidRequest(f"{param} {what}.", param=param, code=code)


def optional(body: Object, name: str, read: Callable[[Any, str], T], default: Any, parent: str = "") -> T | Any:
    """The field `name` of `body`, read by `read`; the default where it is null or absent. `parent` is body's field."""
    value = body.get(name)
    return default if value is None else read(value, f"{parent}.{name}" if parent else name)


def require_one_of(value: Any, names: Collection[str], param: str) -> str:
    if not isinstance(value, str) or value not in names:
        refuse(param, f"must be one of {', '.join(names)}", "unsupported_value")
    return value


def require_object(value: Any, param: str) -> Object:
    if not isinstance(value, dict):
        refuse(param, "must be an object")
    return value


def require_list(value: Any, param: str) -> list[Any]:
    if not isinstance(value, list):
        refuse(param, "must be a list")
    return value


def require_string(value: Any, param: str) -> str:
    if not isinstance(value, str):
        refuse(param, "must be a string")
    return value


def require_text(value: Any, param: str) -> str:
    """A string that is not empty."""
    if not require_string(value, param):
        refuse(param, "must not be empty")
    return str(value)


def require_boolean(value: Any, param: str) -> bool:
    if not isinstance(value, bool):
        refuse(param, "must be true or false")
    return value


def require_number(value: Any, param: str) -> float:
    """A number of at least 0; an integer stays one."""
    if not _is_integer(value) and not isinstance(value, float) or value < 0:
        refuse(param, "must be a number of at least 0")
    number: float = value
    return number


def require_integer(value: Any, param: str) -> int:
    if not _is_integer(value):
        refuse(param, "must be an integer")
    return int(value)


def require_count(value: Any, param: str) -> int:
    """An integer of at least 1."""
    if require_integer(value, param) < 1:
        refuse(param, "must be at least 1")
    return int(value)


def check_json(value: Any, param: str) -> None:
    """Refuses what JSON in UTF-8 cannot say (NaN, half a surrogate pair), and what is nested too deeply."""
    level = [value]
    for _ in range(MAX_DEPTH):
        if not level:
            return
        for item in level:
            if isinstance(item, float) and not math.isfinite(item):
                refuse(param, "has a number that JSON cannot represent")
            if isinstance(item, str) and not _is_encodable(item):
                refuse(param, "has an unpaired surrogate")
        level = [inner for item in level for inner in _inside(item)]
    if level:
        refuse(param, f"is nested deeper than {MAX_DEPTH} levels")


def is_same(value: Any, other: Any) -> bool:
    """Whether two values are equal and of one type: 1 is not true."""
    return type(value) is type(other) and bool(value == other)


def _inside(value: Any) -> list[Any]:
    """The names and values of an object, or the items of a list."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []


def _is_encodable(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
