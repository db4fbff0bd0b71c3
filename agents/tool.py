"""The contract of tools: functions that a role's model may call while it works on a task.

A tool is a plain function. Its author may mark the function with `@tool`, and may register it as an entry point of the
group `troupe.tools`. The package `runtime.tools` runs the function in a separate process.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, PydanticSchemaGenerationError, create_model

F = TypeVar("F", bound=Callable[..., Any])

_IDEMPOTENT = "__troupe_idempotent__"


class NotATool(ValueError):
    """The object cannot be a tool. The message says why and what would be right."""


@dataclass(frozen=True)
class ToolSpec:
    """The description of a tool that a model reads.

    `parameters` is the JSON schema of the arguments, and describes an object. After a crash, the runtime repeats an
    interrupted call only if the tool is `idempotent`.
    """

    name: str
    description: str
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    idempotent: bool = False


def tool(*, idempotent: bool) -> Callable[[F], F]:
    """Mark a function as a tool. The runtime repeats a call that a crash interrupted only if `idempotent` is True."""

    def mark(function: F) -> F:
        setattr(function, _IDEMPOTENT, idempotent)
        return function

    return mark


def spec_of(name: str, function: object) -> ToolSpec:
    """Return the specification of a function as a tool, from its docstring and the types of its parameters.

    Raise NotATool if the object is not a function, has no docstring, or has a parameter that JSON cannot hold.
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
    """Return a pydantic model with a field for each parameter. Raise NotATool if a parameter fits no such field."""
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
