"""Calls of tools as Python writes them: `weather(city="Oslo")`."""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from text.lenient_json import json_of


def python_calls(code: str, tools: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]] | None:
    """Returns names and arguments of calls that stand alone, in a list or in `print`; None for any other code."""
    try:
        statements = ast.parse(code.strip()).body
        expressions = [s.value if isinstance(s, ast.Expr | ast.Assign) else None for s in statements]
        return [_python_call(call, tools) for expression in expressions for call in _listed(expression)]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _listed(expression: ast.AST | None) -> Sequence[ast.AST | None]:
    return expression.elts if isinstance(expression, ast.List | ast.Tuple) else [expression]


def _python_call(call: ast.AST | None, tools: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    if isinstance(call, ast.Call) and ast.unparse(call.func) == "print" and len(call.args) == 1:
        call = call.args[0]
    if not isinstance(call, ast.Call) or (name := ast.unparse(call.func)) not in tools:
        raise ValueError("no call of a tool")
    names = list(tools[name].get("properties", {}))
    if len(call.args) > len(names) or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError("arguments without a name")
    arguments = {name: ast.literal_eval(value) for name, value in zip(names, call.args, strict=False)}
    for keyword in call.keywords:
        if keyword.arg in arguments:
            raise ValueError("two values for an argument")
        arguments[str(keyword.arg)] = ast.literal_eval(keyword.value)
    return name, json_of(arguments)
