"""The keys of a GGUF file's architecture: their values, checked as they are read, and which of them were read."""

import math
from collections.abc import Iterator
from typing import Any

from checkpoints.gguf_header import Array, Header, Value

Attributes = dict[str, Any]  # of transformers' configuration
TOLERANCE = 1e-4  # relative, of values that files have in float32


class Keys:
    """An architecture's values by the end of their keys; it records which of them were read."""

    def __init__(self, header: Header) -> None:
        self.architecture = str(header.values.get("general.architecture", ""))
        self.tensors = header.tensors
        self.read: set[str] = set()
        prefix = f"{self.architecture}."
        self._values = {key.removeprefix(prefix): v for key, v in header.values.items() if key.startswith(prefix)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def value(self, key: str) -> Value | None:
        """Returns None where the file lacks the key. A list of equal numbers, one for each layer, is that number."""
        self.read.add(key)
        value = self._values.get(key)
        if isinstance(value, Array) and len(set(value.items)) == 1:
            return value.items[0]
        return value

    def is_list(self, key: str) -> bool:
        return isinstance(self._values.get(key), Array)

    def number(self, key: str, default: float | None = None) -> Any:
        """Returns a finite number of at least 0; raises ValueError for others, and if key and default are missing."""
        value = self.value(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float):
            problem = "is missing" if value is None else f"is not one number for all layers ({_text(value)})"
            raise ValueError(f"its key {self.architecture}.{key} {problem}")
        if not 0 <= value < math.inf:  # nor is it one that is not a number
            raise self.refuse(key, "it must be at least 0")
        return value

    def positive(self, default: float, *names: str) -> float:
        """Returns the value of a key that has several names; the first one is that of llama.cpp's converter."""
        present = [name for name in names if name in self]
        values = {float(self.number(name)) for name in present}
        if len(values) > 1 or 0.0 in values:
            raise self.refuse(present[-1], f"beside {present[0]}" if len(values) > 1 else "it must be greater than 0")
        return values.pop() if values else default

    def count(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """Returns a whole number of at least `minimum`; raises ValueError for others."""
        value = self.number(key, default)
        if value != int(value) or value < minimum:
            raise self.refuse(key, f"it must be a whole number of at least {minimum}")
        return int(value)

    def refuse(self, key: str, hint: str = "") -> ValueError:
        """Returns the error for a value that is not supported; hint: what would be."""
        value = _text(self._values.get(key))
        suffix = f" ({hint})" if hint else ""
        return ValueError(f"its key {self.architecture}.{key} is {value}, which is not supported{suffix}")

    def has(self, name: str) -> bool:
        """Returns whether the file has the tensor `name`."""
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the tensor `name`, rows first; raises ValueError where the file lacks it."""
        if name not in self.tensors:
            raise ValueError(f"it lacks the tensor {name}")
        return self.tensors[name].shape


def _text(value: Value | None) -> str:
    return f"[{', '.join(map(str, value.items[:3]))}, ...]" if isinstance(value, Array) else str(value)
