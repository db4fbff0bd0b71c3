"""The contract of tools: functions that a role's model may call while it works on a task.

A tool's author writes a plain function, registers it by an entry point of the group `troupe.tools`, and may mark it
with `@tool`. The runtime runs it, in a process of its own; `runtime/tools/` has the rest.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, PydanticSchemaGenerationError, create_model

F = TypeVar("F", bound=Callable[..., Any])

_IDEMPOTENT = "__troupe_idempotent__"


class NotATool(ValueError):
    """An object that cannot be a tool. The message says why and what would be right."""


@dataclass(frozen=True)
class ToolSpec:
    """What a model is told about a tool: its name, what it does, and the JSON schema of its arguments, an object.

    The runtime may run an `idempotent` tool again if a crash interrupted it. It never repeats any other call.
    """

    name: str
    description: str
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    idempotent: bool = False


def tool(*, idempotent: bool) -> Callable[[F], F]:
    """Mark a function as a tool that may, or may not, be run again after a crash. Without the mark, it may not."""

    def mark(function: F) -> F:
        setattr(function, _IDEMPOTENT, idempotent)
        return function

    return mark


def spec_of(name: str, function: object) -> ToolSpec:
    """Return the specification of a function as a tool: its docstring and the types of its parameters.

    Raise NotATool if it is no function, has no docstring, or has a parameter that JSON cannot hold.
    """
    if not callable(function) or inspect.isclass(function):
        raise NotATool(f"{function!r} is not a function")
    description = inspect.getdoc(function)
    if not description:
        raise NotATool(f"{_name(function)} has no docstring, so a model cannot know what it does; write one")
    try:
        parameters = form_of(function).model_json_schema()
    except (PydanticSchemaGenerationError, TypeError, ValueError) as error:
        raise _not_json(function, error) from None
    return ToolSpec(name, description, parameters, bool(getattr(function, _IDEMPOTENT, False)))


def form_of(function: Callable[..., Any]) -> type[BaseModel]:
    """Return a pydantic model that has a field for each parameter of a function. Raise NotATool if there is none."""
    fields: dict[str, Any] = {}
    try:
        signature = inspect.signature(function, eval_str=True)
    except Exception as error:  # noqa: BLE001  evaluating a third party's annotations may raise anything
        raise NotATool(f"the annotations of {_name(function)} cannot be read: {error}") from None
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise NotATool(f"{_name(function)}: the parameter {parameter} must be an ordinary, named one")
        if parameter.annotation is parameter.empty:
            raise NotATool(f"{_name(function)}: the parameter {parameter.name} has no type; annotate it")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (parameter.annotation, default)
    try:
        form: type[BaseModel] = create_model(_name(function), __config__=ConfigDict(extra="forbid"), **fields)
    except (PydanticSchemaGenerationError, TypeError, ValueError) as error:
        raise _not_json(function, error) from None
    return form


def _not_json(function: Callable[..., Any], error: Exception) -> NotATool:
    reason = str(error).partition("\n")[0]
    return NotATool(f"{_name(function)}: its parameters cannot be written as JSON: {reason}")


def _name(function: object) -> str:
    return str(getattr(function, "__name__", repr(function)))
