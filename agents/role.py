"""The contract of a role: it turns a task into chat messages, and the model's text into a typed reply.

A role does no I/O and keeps no state, so the same task always gives the same messages. It raises TaskRefused for a task
that it cannot handle, and ReplyUnusable for a text from which it cannot read a reply.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agents import reply_budget


class TaskRefused(ValueError):
    """The role cannot handle this task. The message says what the role can handle."""


class ReplyUnusable(ValueError):
    """The role cannot read a reply from the model's text. The message says what is wrong with the text."""


class Value(BaseModel):
    """A frozen pydantic model that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Message:
    """One chat message, in the form that chat templates expect."""

    role: Literal["system", "user", "assistant"]
    content: str


class Sampling(Value):
    """The sampling parameters of a role's replies.

    A retry uses the higher one of `retry_temperature` and `temperature`. So does every further sample of a task.
    """

    temperature: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=512, ge=1)
    stop: tuple[str, ...] = ()
    retry_temperature: float = Field(default=0.7, ge=0, le=2)


class Reply(Value):
    """The base class of replies: pydantic models that a role reads from a model's text.

    The transcript shows `str(reply)`. A role in YAML asks for a JSON object. `form_schema` is the schema that the
    object must fit, and `from_form` reads the object.
    """

    def __str__(self) -> str:
        return self.model_dump_json()

    @classmethod
    def form_schema(cls) -> dict[str, Any]:
        """Return the JSON schema of the objects that `from_form` reads. The default is the reply's own schema."""
        return cls.model_json_schema()

    @classmethod
    def from_form(cls, form: Mapping[str, Any]) -> Self:
        """Return the reply that an object describes. The object fits `form_schema` and may have more properties.

        Raise pydantic's ValidationError if a value is invalid.
        """
        return cls.model_validate({name: form[name] for name in cls.model_fields if name in form})


@dataclass(frozen=True)
class Task:
    """The base class of tasks: frozen dataclasses that say what a workflow asks of a seat.

    `kind` is the name of the task in configurations and in YAML roles. `reply_type` is the type of the reply. A prompt
    in YAML may use each field as a placeholder, and must use the field that `essential` names. The transcript shows
    `str(task)`.
    """

    kind: ClassVar[str]
    reply_type: ClassVar[type[Reply]]
    essential: ClassVar[str] = "problem"

    problem: str

    def __str__(self) -> str:
        return self.problem

    @classmethod
    def placeholders(cls) -> tuple[str, ...]:
        """Return the names of the fields. A prompt in YAML uses them as placeholders."""
        return tuple(part.name for part in fields(cls))

    def texts(self) -> dict[str, str]:
        """Return the text for each placeholder of a prompt. A list or mapping has one line for each value."""
        return {name: as_text(getattr(self, name)) for name in self.placeholders()}

    @classmethod
    def examples(cls) -> Sequence[Self]:
        """Return sample tasks of this kind, with which `troupe roles check` checks roles. The default is none."""
        return ()


def as_text(value: object) -> str:
    """Return a value for a prompt. Write each element or property on its own line, and nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "\n".join(f"{name}: {as_text(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return "\n".join(map(as_text, value))
    return str(value)


class Role(ABC):
    """The base class of roles. A role asks a model to handle tasks and reads the model's replies.

    `takes` lists the kinds of task that the role handles. For tasks of the kind `write`, `needs` names the results that
    the role must find in a task, and `gives` names the values of the role's replies. `tools` names the tools that the
    model may call. A configuration can override `sampling` and `tools`. Troupe creates a role without arguments.
    """

    takes: ClassVar[tuple[type[Task], ...]]
    needs: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[tuple[str, ...]] = ()
    sampling: ClassVar[Sampling] = Sampling()
    tools: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def messages(self, task: Task) -> list[Message]:
        """Return the chat that asks a model to handle the task. Raise TaskRefused if the role cannot handle it."""

    @abstractmethod
    def parse(self, text: str, task: Task) -> Reply:
        """Return the reply in the model's text. Its type is the task's `reply_type`.

        Raise ReplyUnusable if the text does not hold such a reply.
        """

    def schema(self, task: Task) -> dict[str, Any] | None:
        """Return the JSON schema that the engine forces the model's text to follow, or None for free text."""
        return None

    def max_tokens(self, task: Task) -> int:
        """Return the maximum number of tokens of a reply. A `max_tokens` in the configuration overrides it."""
        return self.sampling.max_tokens

    def check(self, problem: str) -> None:
        """Raise TaskRefused if the role can never handle this problem. Troupe calls this before any engine request."""
        return


Forms = Mapping[type[Task], type[BaseModel]]


class SchemaRole(Role):
    """A role whose model replies in JSON. `forms` maps each kind of task to the pydantic model of its reply.

    Limit the length of every string and list in a form. `max_tokens` then is the number of tokens that ordinary text of
    that length needs, and at most `sampling.max_tokens`. If a reply is cut off, the role reads the properties that the
    model has completed.
    """

    forms: ClassVar[Forms]

    def max_tokens(self, task: Task) -> int:
        budget = reply_budget.tokens(self.schema(task))
        return self.sampling.max_tokens if budget is None else min(budget, self.sampling.max_tokens)

    def schema(self, task: Task) -> dict[str, Any]:
        """Return the schema of the task's form. The model must write every property, even one with a default.

        The default applies if the reply is cut off before the property.
        """
        schema = self.forms[type(task)].model_json_schema()
        return {**schema, "required": list(schema["properties"])}

    def parse(self, text: str, task: Task) -> Reply:
        try:
            return self.reply(self.forms[type(task)].model_validate(read_json(text)), task)
        except ValidationError as error:
            raise ReplyUnusable(explain(error)) from None

    @abstractmethod
    def reply(self, form: Any, task: Task) -> Reply:
        """Return the reply for a filled form. `form` is an instance of `forms[type(task)]`."""


def explain(error: ValidationError, whole: str = "the reply", most: int | None = None) -> str:
    """Return the errors of a pydantic validation in one line. Each error names its field and the valid values.

    `whole` names what was validated, for an error of no field. `most` is how many errors to return; all by default.
    """
    return "; ".join(
        f"{'.'.join(map(str, e['loc'])) or whole}: {e['msg'][0].lower()}{e['msg'][1:]}" for e in error.errors()[:most]
    )


NESTING_MAX = 100
"""The most levels of lists and objects in the JSON of a model. pydantic writes at most 254 levels of an event."""


def read_json(text: str) -> Any:
    """Return the JSON value in a model's text. Raise ReplyUnusable if the text is not JSON.

    Also raise ReplyUnusable for a value that could not be written as JSON again: one with half of a surrogate pair, a
    number that is not finite, or lists and objects that are nested more than NESTING_MAX deep.

    Strings may hold control characters, because a grammar that limits a string's length does not exclude them.
    """
    try:
        value = json.loads(text, strict=False)
    except json.JSONDecodeError as error:
        raise ReplyUnusable(f"not JSON: {error.msg} at character {error.pos + 1} of {len(text)}") from None
    except (ValueError, RecursionError) as error:  # an integer with too many digits; brackets nested too deep
        raise ReplyUnusable(f"not JSON: {error}") from None
    _check_writable(value)
    return value


def _check_writable(value: Any, depth: int = 0) -> None:
    """Raise ReplyUnusable if a JSON value cannot be written as JSON again."""
    match value:
        case str():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ReplyUnusable(f"not JSON: {value[error.start]!r} is half of a surrogate pair") from None
        case float() if not math.isfinite(value):
            raise ReplyUnusable(f"not JSON: a number is {value}; it must be finite")
        case dict() | list() if depth == NESTING_MAX:
            raise ReplyUnusable(f"not JSON: it is nested more than {NESTING_MAX} deep")
        case dict():
            for name, inner in value.items():
                _check_writable(name)
                _check_writable(inner, depth + 1)
        case list():
            for inner in value:
                _check_writable(inner, depth + 1)
