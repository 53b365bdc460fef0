"""Constraints: what a request says of its answer's form, compiled for the engine."""

import asyncio
from typing import TYPE_CHECKING

from errors import InvalidRequest, unsupported
from schemas import ChatCompletionRequest, CompletionRequest
from serving.loading import LoadedModel
from text.structured_output import Structure, structure_of
from text.tools import ToolSet

if TYPE_CHECKING:
    from engine.constraint import Constraint
    from engine.sample.grammar import GrammarCompiler


async def constraint_of(
    loaded: LoadedModel, request: ChatCompletionRequest | CompletionRequest, tools: ToolSet | None
) -> "Constraint | None":
    """Compiles the structure that a request asks for, or that its tools have; None if its answer is free.

    Raises InvalidRequest.
    """
    template = loaded.template
    structure = await asyncio.to_thread(structure_of, request, tools, template.tool_format, template.literals)
    return None if structure is None else await _compiled(loaded, structure, tools is None or tools.is_parallel)


async def _compiled(loaded: LoadedModel, structure: Structure, is_parallel: bool) -> "Constraint | None":
    """Raises InvalidRequest, whose param names the field that no grammar can be made of."""
    from engine.sample.grammar import TriggeredGrammar

    if loaded.grammars is None:
        if structure.is_needed:
            raise unsupported(next(iter(structure.fields)))
        return None
    trigger = None if structure.trigger is None else loaded.template.token_id(structure.trigger)
    try:
        grammar = await asyncio.to_thread(loaded.grammars.compile, structure.text)
    except ValueError as error:
        if not structure.is_needed:
            return None
        field = await asyncio.to_thread(_wrong_field, loaded.grammars, structure)
        raise InvalidRequest(f"{field}: {error}", param=field, code="invalid_value") from error
    return grammar if trigger is None else TriggeredGrammar(grammar, trigger, is_parallel)


def _wrong_field(grammars: "GrammarCompiler", structure: Structure) -> str:
    """Returns the first field whose part of the grammar cannot be compiled by itself."""
    for field, text in structure.fields.items():
        try:
            grammars.compile(text)
        except ValueError:
            return field
    return next(iter(structure.fields))
