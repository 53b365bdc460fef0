"""GemmaGrammar: the grammar of a call's arguments in Gemma's notation, by their schema.

What the notation has no rules for (limits and patterns of texts, properties that are not listed) is JSON in its place.
Where the schema's references lead elsewhere than to its definitions, no part of it can stand alone, and all is JSON.
"""

from collections.abc import Callable, Mapping
from typing import Any

from text.argument_schemas import MAX_DEPTH, fits, kinds_of, resolved
from text.json_schemas import ANNOTATIONS
from text.tool_calls.gemma_values import BARE_KEY, in_order, written
from text.tool_calls.lark import (
    Literals,
    Schema,
    definitions_of,
    in_regex,
    json_of_schema,
    leads_to_definitions,
)

MAX_ITEMS = 200  # that a rule of a list counts
IGNORED = {*ANNOTATIONS, "$defs", "definitions", "$schema", "nullable"}
OF_TEXTS = {"minLength", "maxLength", "pattern", "format"}
OF_NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
OF_LISTS = {"items", "minItems", "maxItems"}
OF_OBJECTS = {"properties", "required", "additionalProperties"}
SILENT = {  # by type, the keywords that say nothing of it
    "string": OF_NUMBERS | OF_LISTS | OF_OBJECTS,
    "number": OF_TEXTS | OF_LISTS | OF_OBJECTS,
    "integer": OF_TEXTS | OF_LISTS | OF_OBJECTS,
    "boolean": OF_TEXTS | OF_NUMBERS | OF_LISTS | OF_OBJECTS,
    "null": OF_TEXTS | OF_NUMBERS | OF_LISTS | OF_OBJECTS,
    "array": OF_TEXTS | OF_NUMBERS | OF_OBJECTS,
    "object": OF_TEXTS | OF_NUMBERS | OF_LISTS,
}


class Malformed(Exception):
    """A schema that is none; llguidance has the words to refuse it."""


class GemmaGrammar:
    def __init__(self, rule: str, schema: Schema, quote: str, literals: Literals) -> None:
        """rule: what the names of the rules begin with."""
        self._rule, self._root, self._quote, self._literals = rule, schema, quote, literals
        self._names: dict[int, str] = {}  # of rules, by the identity of the schema: references may lead to one often
        self._kinds: Mapping[str, Callable[[Mapping[str, Any], int], str | None]] = {
            "string": self._string,
            "number": lambda schema, depth: None,
            "integer": lambda schema, depth: None,
            "boolean": lambda schema, depth: '"true" | "false"',
            "null": lambda schema, depth: '"null"',
            "array": self._list,
            "object": self._object,
        }
        self._made: list[Any] = []  # schemas, kept since their identity has a name
        self.rules: list[str] = []
        self.start = self._started()  # what stands for the arguments, with their braces

    def _started(self) -> str:
        try:
            if leads_to_definitions(self._root):
                return self._value(self._root, 0)
        except Malformed:
            self.rules = []
        return json_of_schema(self._root)

    def _value(self, schema: Any, depth: int) -> str:
        """Returns the rule of a value, which is added where it is new."""
        if schema is True or (isinstance(schema, dict) and not schema.keys() - IGNORED):
            return self._anything()
        if not isinstance(schema, dict):
            raise Malformed
        if id(schema) not in self._names:
            self._names[id(schema)] = name = f"{self._rule}_{len(self._names)}"
            choices = self._choices(schema, depth + 1) or self._json(schema)
            may_be_null = schema.get("nullable") is True and not schema.keys() & {"enum", "const"}
            self.rules.append(f"{name}: {choices}" + (' | "null"' if may_be_null else ""))
        return self._names[id(schema)]

    def _json(self, schema: Schema) -> str:
        return json_of_schema({**definitions_of(self._root), **schema})

    def _choices(self, schema: Schema, depth: int) -> str | None:
        """Returns a value's notation, or several; None if it has none."""
        keys = schema.keys() - IGNORED
        if depth > MAX_DEPTH:
            return None
        if keys == {"$ref"}:
            target = resolved(schema, self._root)
            return self._value(target, depth) if target else None
        if keys & {"enum", "const"}:
            return self._constants(schema) if keys - {"type"} in ({"enum"}, {"const"}) else None
        if key := next((key for key in ("anyOf", "oneOf", "allOf") if keys in ({key}, {key, "type"})), None):
            return self._combined(key, schema, depth)
        return self._typed(schema, keys, depth)

    def _typed(self, schema: Schema, keys: set[str], depth: int) -> str | None:
        kinds = schema.get("type", "object" if "properties" in keys else "array" if "items" in keys else None)
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if not kinds or not all(isinstance(kind, str) and kind in self._kinds for kind in kinds):
            return None
        return " | ".join(self._of_kind(schema, kind, depth) for kind in kinds)

    def _of_kind(self, schema: Schema, kind: str, depth: int) -> str:
        own = {key: value for key, value in schema.items() if key not in SILENT[kind]} | {"type": kind}
        return self._kinds[kind](own, depth) or self._json(own)

    def _combined(self, key: str, schema: Schema, depth: int) -> str | None:
        parts = schema[key]
        if not isinstance(parts, list) or not parts:
            return None
        if "type" in schema:
            parts = [{"type": schema["type"], **part} for part in parts if isinstance(part, dict)]
            if len(parts) < len(schema[key]) or any(part["type"] != schema["type"] for part in parts):
                return None
            self._made += parts
        if len(parts) > 1 and (key == "allOf" or (key == "oneOf" and not self._are_apart(parts))):
            return None
        return " | ".join(self._value(part, depth) for part in parts)

    def _are_apart(self, parts: list[Any]) -> bool:
        """Returns whether no value fits two of the schemas."""
        kinds = [{"number" if kind == "integer" else kind for kind in kinds_of(part, self._root)} for part in parts]
        return all(kinds) and sum(map(len, kinds)) == len(set().union(*kinds))

    def _constants(self, schema: Schema) -> str | None:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        fitting = [value for value in values if fits(value, schema, self._root)] if isinstance(values, list) else []
        return " | ".join(self._literals.of(written(value, self._quote)) for value in fitting) or None

    # --- texts, and values of any kind

    def _string(self, schema: Schema, depth: int) -> str | None:
        return None if schema.keys() - IGNORED - {"type"} else self._text()

    def _text(self) -> str:
        """Returns the rule of a text, which ends with the first mark."""
        quote, name = self._quote, f"{self._rule}_text"
        if quote in self._literals:
            self._add(f"{name}: {self._literals.of(quote)} {name}_inner {self._literals.of(quote)}")
            self._add(f"{name}_inner: /(.|\\n)*/")
        else:
            self._add(f"{name}[lazy]: /{in_regex(quote)}(.|\\n)*{in_regex(quote)}/")
        return name

    def _anything(self) -> str:
        name, scalars = f"{self._rule}_any", json_of_schema({"type": ["number", "boolean", "null"]})
        self._add(f"{name}: {self._text()} | {scalars} | {name}_list | {name}_object")
        self._add(f'{name}_list: "[" ({name} ("," {name})*)? "]"')
        self._add(f'{name}_object: "{{" ({name}_member ("," {name}_member)*)? "}}"')
        self._add(f'{name}_member: /[a-zA-Z_][a-zA-Z0-9_.-]{{0,60}}/ ":" {name}')
        return name

    def _add(self, rule: str) -> None:
        if rule not in self.rules:
            self.rules.append(rule)

    # --- lists and objects

    def _list(self, schema: Schema, depth: int) -> str | None:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if schema.keys() - IGNORED - OF_LISTS - {"type"} or not _are_counts(least, MAX_ITEMS if most is None else most):
            return None
        item = self._value(schema.get("items", True), depth)
        others = f'("," {item}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
        return f'"[" {item} {others} "]"' if least else f'"[" ({item} {others})? "]"'

    def _object(self, schema: Schema, depth: int) -> str | None:
        """Members come in the order in which the template writes them."""
        properties, required = schema.get("properties", {}), schema.get("required", [])
        others = schema.get("additionalProperties")
        if schema.keys() - IGNORED - OF_OBJECTS - {"type"} or not _are_listed(required, properties):
            return None
        if not properties and others is not False:
            return f"{self._anything()}_object" if others is None or others is True or others == {} else None
        if (others is not None and others is not False) or not all(map(BARE_KEY.fullmatch, properties)):
            return None
        members = [
            (f"{self._literals.of(f'{key}:')} {self._value(properties[key], depth)}", key in required)
            for key in in_order(properties)
        ]
        return f'"{{" {self._members(members)} "}}"'

    def _members(self, members: list[tuple[str, bool]]) -> str:
        """Returns the grammar of members with commas between them; not all are required."""
        firsts, rest = list[str](), ""
        for number, (member, is_required) in reversed([*enumerate(members)]):
            firsts = [f"{member} {rest}", *([] if is_required else firsts)]
            if number:
                name = f"{self._rule}_r{len(self.rules)}"
                self.rules.append(f'{name}: ("," {member}){"" if is_required else "?"} {rest}')
                rest = name
        must_come = any(is_required for _, is_required in members)
        return f"({' | '.join(firsts)}){'' if must_come else '?'}" if members else ""


def _are_listed(required: Any, properties: Any) -> bool:
    """Returns whether the first is a list of keys of the second."""
    are_lists = isinstance(properties, dict) and isinstance(required, list)
    return are_lists and all(isinstance(key, str) and key in properties for key in required)


def _are_counts(least: Any, most: Any) -> bool:
    """Returns whether the rules of a list can count from the first number to the second."""
    is_known = all(type(number) is int and 0 <= number <= MAX_ITEMS for number in (least, most))
    return is_known and max(least, 1) <= most
