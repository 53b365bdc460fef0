"""Values of parsed JSON: `require_...` refuses a request's value of the wrong type, `..._or_empty` passes over it."""

from collections.abc import Callable, Collection
from typing import Any, NoReturn, TypeVar

from errors import InvalidRequest

Object = dict[str, Any]
T = TypeVar("T")


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
    """Returns the field `name` of `body`, read by `read`; the default where it is null or absent. `parent` is body's
    field."""
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
    """Returns a string that is not empty."""
    if not require_string(value, param):
        refuse(param, "must not be empty")
    return str(value)


def require_boolean(value: Any, param: str) -> bool:
    if not isinstance(value, bool):
        refuse(param, "must be true or false")
    return value


def require_number(value: Any, param: str) -> float:
    """Returns a number of at least 0; an integer stays one."""
    if not _is_integer(value) and not isinstance(value, float) or value < 0:
        refuse(param, "must be a number of at least 0")
    number: float = value
    return number


def require_integer(value: Any, param: str) -> int:
    if not _is_integer(value):
        refuse(param, "must be an integer")
    return int(value)


def require_count(value: Any, param: str) -> int:
    """Returns an integer of at least 1."""
    if require_integer(value, param) < 1:
        refuse(param, "must be at least 1")
    return int(value)


def is_same(value: Any, other: Any) -> bool:
    """Returns whether two values are equal and of one type: 1 is not true."""
    return type(value) is type(other) and bool(value == other)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
