"""The contract of a role: tasks in, chat messages out; text in, typed replies out.

A role does no I/O and keeps no state: the same task always gives the same messages. Errors: TaskRefused when a role
cannot take a task at all, ReplyUnusable when a reply's text is not what the role asked for.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class TaskRefused(ValueError):
    """The role cannot take this task; the message says what it can take."""


class ReplyUnusable(ValueError):
    """The reply's text is not what the role asked for; the message says what is missing."""


class Value(BaseModel):
    """A frozen value that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Message:
    """One chat message, as chat templates take it."""

    role: Literal["system", "user", "assistant"]
    content: str


class Sampling(Value):
    """How an engine samples a reply. `retry_temperature` is the least for a second try of the same task."""

    temperature: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=512, ge=1)
    stop: tuple[str, ...] = ()
    retry_temperature: float = Field(default=0.7, ge=0, le=2)


class Step(Value):
    """One step of a plan. `needs` names the earlier steps whose results it uses."""

    name: str = Field(min_length=1)
    instruction: str = Field(min_length=1)
    needs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}={self.instruction}"


@dataclass(frozen=True)
class PlanTask:
    """Split the problem into steps."""

    problem: str

    def __str__(self) -> str:
        return self.problem


@dataclass(frozen=True)
class SolveTask:
    """Work one step. `results` holds the results of the steps that it needs; `feedback` why the last was rejected."""

    problem: str
    step: Step
    results: Mapping[str, str] = field(default_factory=dict)
    feedback: str = ""

    def __str__(self) -> str:
        return _with_results(self.step, self.results)


@dataclass(frozen=True)
class CritiqueTask:
    """Judge the result of one step."""

    problem: str
    step: Step
    result: str
    results: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{_with_results(self.step, self.results)} gives {self.result}"


@dataclass(frozen=True)
class AnswerTask:
    """State the answer: from the results of the steps, or at once where there are none."""

    problem: str
    steps: tuple[Step, ...] = ()
    results: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.problem


def _with_results(step: Step, results: Mapping[str, str]) -> str:
    known = ", ".join(f"{name}={result}" for name, result in results.items())
    return f"{step.instruction} with {known}" if known else step.instruction


Task = PlanTask | SolveTask | CritiqueTask | AnswerTask
TASKS: Mapping[str, type[Task]] = {
    "plan": PlanTask,
    "solve": SolveTask,
    "critique": CritiqueTask,
    "answer": AnswerTask,
}


class Plan(Value):
    """Steps in order. `answer_step` names the one whose result is the answer; without it the solver is asked."""

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
    """Whether a result stands, and why."""

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
"""What a workflow expects of each kind of task."""


class Role(ABC):
    """What one member of a team says.

    `takes` are the kinds of task it handles; `sampling` its defaults, which a configuration may change.
    """

    takes: ClassVar[tuple[type[Task], ...]]
    sampling: ClassVar[Sampling] = Sampling()

    @abstractmethod
    def messages(self, task: Task) -> list[Message]:
        """The chat that puts the task to a model. Raises TaskRefused when the role cannot take it."""

    @abstractmethod
    def parse(self, text: str, task: Task) -> Reply:
        """The reply in a model's text, of the type that REPLIES names for the task. Raises ReplyUnusable."""

    def schema(self, task: Task) -> dict[str, Any] | None:
        """The JSON schema that the engine holds the model's text to; None for free text."""
        return None

    def check(self, problem: str) -> None:
        """Raise TaskRefused for a problem that this role could not work. Called before any engine is asked."""
        return


Forms = Mapping[type[Task], type[BaseModel]]


class SchemaRole(Role):
    """A role whose model answers in JSON of a fixed schema, one pydantic model for each kind of task it takes.

    Bound every string and list, and set `max_tokens` to four times their sum in characters: then a reply ends before
    it is cut, also from a model that writes a rare character in four tokens.
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
        """The typed reply in a filled form."""


def explain(error: ValidationError) -> str:
    """Each complaint of a validation in a line: where, and what would be right."""
    return "; ".join(
        f"{'.'.join(map(str, e['loc'])) or 'the reply'}: {e['msg'][0].lower()}{e['msg'][1:]}" for e in error.errors()
    )


def read_json(text: str) -> Any:
    """The JSON in a model's reply. Raises ReplyUnusable.

    Control characters are let through in strings: a grammar that bounds a string's length does not keep them out.
    """
    try:
        return json.loads(text, strict=False)
    except json.JSONDecodeError as error:
        raise ReplyUnusable(f"not JSON: {error.msg} at character {error.pos + 1} of {len(text)}") from None
    except (ValueError, RecursionError) as error:  # digits without end, brackets without end
        raise ReplyUnusable(f"not JSON: {error}") from None
