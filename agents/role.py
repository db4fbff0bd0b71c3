"""The contract of a role: it turns a task into chat messages, and the model's text into a typed reply.

A role does no I/O and keeps no state, so the same task always gives the same messages. It raises TaskRefused for a task
that it cannot handle, and ReplyUnusable for a text that does not hold the reply it asked for.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agents import reply_budget


class TaskRefused(ValueError):
    """The role cannot handle this task. The message says what it can handle."""


class ReplyUnusable(ValueError):
    """The model's text does not hold the reply that the role asked for. The message says what is wrong with it."""


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

    A retry, or a further sample of the same task, uses `retry_temperature` or `temperature`, whichever is higher.
    """

    temperature: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=512, ge=1)
    stop: tuple[str, ...] = ()
    retry_temperature: float = Field(default=0.7, ge=0, le=2)


class Reply(Value):
    """The base of replies: pydantic models that a role reads from a model's text. `str(reply)` is for the transcript.

    A role in YAML asks for a JSON object. `form_schema` says which properties it needs; `from_form` reads them.
    """

    def __str__(self) -> str:
        return self.model_dump_json()

    @classmethod
    def form_schema(cls) -> dict[str, Any]:
        """Return the JSON schema of an object from which `from_form` makes a reply: by default the reply's own."""
        return cls.model_json_schema()

    @classmethod
    def from_form(cls, form: Mapping[str, Any]) -> Self:
        """Return the reply in an object that fits `form_schema` and may have more properties.

        Raise pydantic's ValidationError for values that the reply cannot have.
        """
        return cls.model_validate({name: form[name] for name in cls.model_fields if name in form})


@dataclass(frozen=True)
class Task:
    """The base of tasks: frozen dataclasses that say what a workflow asks of a seat.

    `kind` is the name that configurations and roles in YAML use. `reply_type` is the type of the reply. A prompt in
    YAML has a placeholder for each field and must use `essential`. `str(task)` is for the transcript.
    """

    kind: ClassVar[str]
    reply_type: ClassVar[type[Reply]]
    essential: ClassVar[str] = "problem"

    problem: str

    def __str__(self) -> str:
        return self.problem

    @classmethod
    def placeholders(cls) -> tuple[str, ...]:
        """Return the names of the fields, which are the placeholders of a prompt in YAML."""
        return tuple(part.name for part in fields(cls))

    def texts(self) -> dict[str, str]:
        """Return the text of each field, for the placeholders of a prompt. Several values take one line each."""
        return {name: _lines(getattr(self, name)) for name in self.placeholders()}

    @classmethod
    def examples(cls) -> Sequence[Self]:
        """Return some tasks of this kind, to check roles with. Without any, `troupe roles check` checks less."""
        return ()


def _lines(value: object) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{name}: {part}" for name, part in value.items())
    return "\n".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


class Role(ABC):
    """The base class of roles. A role asks a model to handle tasks and reads the model's replies.

    `takes` lists the kinds of task that the role handles. For tasks of the kind `write`, `needs` names the results that
    the role must find in a task, and `gives` names the values of its replies. `sampling` and `tools`, the names of the
    tools that its model may call, are defaults that a configuration can override. A role is created without arguments.
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
        """Return the reply in the model's text, of the type that the task names as `reply_type`.

        Raise ReplyUnusable if the text does not hold one.
        """

    def schema(self, task: Task) -> dict[str, Any] | None:
        """Return the JSON schema that the engine forces the model's text to follow, or None for free text."""
        return None

    def max_tokens(self, task: Task) -> int:
        """Return the most tokens of a reply to this task, unless the configuration sets `max_tokens`."""
        return self.sampling.max_tokens

    def check(self, problem: str) -> None:
        """Raise TaskRefused if the role can never handle this problem. Called before any request to an engine."""
        return


Forms = Mapping[type[Task], type[BaseModel]]


class SchemaRole(Role):
    """A role whose model replies in JSON. `forms` maps each kind of task to the pydantic model of its reply.

    Limit the length of every string and list. A reply then may have as many tokens as ordinary text of that length
    needs, and at most `sampling.max_tokens`. A reply that is cut off keeps the properties that the model has reached.
    """

    forms: ClassVar[Forms]

    def max_tokens(self, task: Task) -> int:
        budget = reply_budget.tokens(self.schema(task))
        return self.sampling.max_tokens if budget is None else min(budget, self.sampling.max_tokens)

    def schema(self, task: Task) -> dict[str, Any]:
        return self.forms[type(task)].model_json_schema()

    def parse(self, text: str, task: Task) -> Reply:
        try:
            return self.reply(self.forms[type(task)].model_validate(read_json(text)), task)
        except ValidationError as error:
            raise ReplyUnusable(explain(error)) from None

    @abstractmethod
    def reply(self, form: Any, task: Task) -> Reply:
        """Return the reply that a filled form holds. `form` is an instance of `forms[type(task)]`."""


def explain(error: ValidationError) -> str:
    """Return all complaints of a pydantic validation in one line, each with its field and what would be right."""
    return "; ".join(
        f"{'.'.join(map(str, e['loc'])) or 'the reply'}: {e['msg'][0].lower()}{e['msg'][1:]}" for e in error.errors()
    )


def read_json(text: str) -> Any:
    """Return the JSON value in a model's text. Raise ReplyUnusable if the text is not JSON.

    Strings may hold control characters: a grammar that limits a string's length does not exclude them.
    """
    try:
        return json.loads(text, strict=False)
    except json.JSONDecodeError as error:
        raise ReplyUnusable(f"not JSON: {error.msg} at character {error.pos + 1} of {len(text)}") from None
    except (ValueError, RecursionError) as error:  # an integer with too many digits; brackets nested too deep
        raise ReplyUnusable(f"not JSON: {error}") from None
