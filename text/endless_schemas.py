"""Schemas that only values without an end would fit: an object that must hold one of its own kind, which must, too."""

from collections.abc import Iterator, Mapping
from typing import Any

from text.argument_schemas import target_of

MOST_VISITS = 10_000  # of parts of a schema; one that has more is not judged


def is_endless(schema: Any) -> bool:
    """Returns whether no value that ends fits a schema, as far as its references and required parts tell."""
    return isinstance(schema, Mapping) and not _Search(schema).has_end(schema, frozenset())


class _Search:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._num_visits = 0
        self._ending: dict[int, Any] = {}  # parts that are known to have an end, by identity

    def has_end(self, schema: Any, above: frozenset[int]) -> bool:
        """above: the parts that this one is in, none of which it may need."""
        self._num_visits += 1
        if not isinstance(schema, Mapping) or id(schema) in self._ending or self._num_visits > MOST_VISITS:
            return True
        if id(schema) in above:
            return False
        inside = above | {id(schema)}
        found = all(any(self.has_end(part, inside) for part in choice) for choice in self._needs(schema))
        if found:
            self._ending[id(schema)] = schema
        return found

    def _needs(self, schema: Mapping[str, Any]) -> Iterator[list[Any]]:
        """Yields choices, one part of each of which every value needs."""
        if isinstance(schema.get("$ref"), str):
            yield [target_of(schema["$ref"], self._root)]
        for key in ("anyOf", "oneOf"):
            if isinstance(parts := schema.get(key), list) and parts:
                yield parts
        if isinstance(parts := schema.get("allOf"), list):
            yield from ([part] for part in parts)
        kinds = schema.get("type", "object" if "properties" in schema else None)
        if kinds in ("object", ["object"]):
            properties, required = schema.get("properties"), schema.get("required")
            if isinstance(required, list) and isinstance(properties, dict):
                yield from ([properties[name]] for name in required if isinstance(name, str) and name in properties)
        least = schema.get("minItems")
        if kinds in ("array", ["array"]) and isinstance(least, int) and least > 0 and "items" in schema:
            yield [schema["items"]]
