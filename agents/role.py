"""The contract of a role: it turns a task into chat messages, and the model's text into a typed reply.

A role does no I/O and keeps no state, so the same task always gives the same messages. It raises TaskRefused for a task
that it cannot handle, and ReplyUnusable for a text that does not hold the reply it asked for.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError


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


class Step(Value):
    """One step of a plan. `needs` lists the names of the earlier steps whose results it uses."""

    name: str = Field(min_length=1)
    instruction: str = Field(min_length=1)
    needs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}={self.instruction}"


@dataclass(frozen=True)
class PlanTask:
    """A request to split the problem into steps."""

    problem: str

    def __str__(self) -> str:
        return self.problem


@dataclass(frozen=True)
class SolveTask:
    """A request to solve one step.

    `results` holds the results of the steps in `step.needs`, by name. `feedback` says why the previous result was
    rejected; it is empty on the first try.
    """

    problem: str
    step: Step
    results: Mapping[str, str] = field(default_factory=dict)
    feedback: str = ""

    def __str__(self) -> str:
        return _with_results(self.step, self.results)


@dataclass(frozen=True)
class CritiqueTask:
    """A request to judge the result of one step."""

    problem: str
    step: Step
    result: str
    results: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{_with_results(self.step, self.results)} gives {self.result}"


@dataclass(frozen=True)
class AnswerTask:
    """A request to state the answer: from the results of the steps, or directly if there are no steps."""

    problem: str
    steps: tuple[Step, ...] = ()
    results: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.problem


def _with_results(step: Step, results: Mapping[str, str]) -> str:
    values = ", ".join(f"{name}={result}" for name, result in results.items())
    return f"{step.instruction} with {values}" if values else step.instruction


Task = PlanTask | SolveTask | CritiqueTask | AnswerTask
TASKS: Mapping[str, type[Task]] = {
    "plan": PlanTask,
    "solve": SolveTask,
    "critique": CritiqueTask,
    "answer": AnswerTask,
}
"""The kinds of task, by the name that configurations and roles in YAML use."""


class Plan(Value):
    """The steps of a problem, in order.

    `answer_step` names the step whose result is the answer. If it is None, the workflow asks a seat for the answer.
    """

    steps: tuple[Step, ...] = Field(min_length=1)
    answer_step: str | None = None

    def __str__(self) -> str:
        return "; ".join(map(str, self.steps))


class Solution(Value):
    """The result of a step, and the work that led to it."""

    result: str = Field(min_length=1)
    work: str = ""

    def __str__(self) -> str:
        return self.result


class Verdict(Value):
    """A judgement of a result: accepted or rejected, and why."""

    accepted: bool
    reason: str = ""

    def __str__(self) -> str:
        return ("accepted" if self.accepted else "rejected") + (f": {self.reason}" if self.reason else "")


class Answer(Value):
    """The answer to the problem."""

    answer: str = Field(min_length=1)

    def __str__(self) -> str:
        return self.answer


Reply = Plan | Solution | Verdict | Answer
REPLIES: Mapping[type[Task], type[Reply]] = {
    PlanTask: Plan,
    SolveTask: Solution,
    CritiqueTask: Verdict,
    AnswerTask: Answer,
}
"""The type of reply to each kind of task."""


class Role(ABC):
    """The base class of roles. A role asks a model to handle tasks and reads the model's replies.

    `takes` lists the kinds of task that the role handles. `sampling` holds its defaults; a configuration can override
    them. A role is created without arguments.
    """

    takes: ClassVar[tuple[type[Task], ...]]
    sampling: ClassVar[Sampling] = Sampling()

    @abstractmethod
    def messages(self, task: Task) -> list[Message]:
        """Return the chat that asks a model to handle the task. Raise TaskRefused if the role cannot handle it."""

    @abstractmethod
    def parse(self, text: str, task: Task) -> Reply:
        """Return the reply in the model's text: a Plan for a PlanTask, a Solution for a SolveTask, and so on.

        Raise ReplyUnusable if the text does not hold one.
        """

    def schema(self, task: Task) -> dict[str, Any] | None:
        """Return the JSON schema that the engine forces the model's text to follow, or None for free text."""
        return None

    def check(self, problem: str) -> None:
        """Raise TaskRefused if the role can never handle this problem. Called before any request to an engine."""
        return


Forms = Mapping[type[Task], type[BaseModel]]


class SchemaRole(Role):
    """A role whose model replies in JSON. `forms` maps each kind of task to the pydantic model of its reply.

    Limit the length of every string and list, and set `max_tokens` to four times the sum of the limits in characters.
    Then a reply always ends before `max_tokens` cuts it, even if the model needs four tokens for a rare character.
    """

    forms: ClassVar[Forms]

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
