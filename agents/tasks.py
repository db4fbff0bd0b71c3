"""The kinds of task that come with Troupe, and the reply to each.

A package can add kinds of task: it derives classes from `Task` and `Reply`, and registers the tasks as entry points of
the group `troupe.tasks`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from pydantic import Field

from agents.role import Reply, Task, Value

_TRAVEL = "A train leaves at 9:40 and arrives at 11:05. How long does it travel?"


class Step(Value):
    """One step of a plan. `needs` lists the names of the earlier steps whose results this step uses."""

    name: str = Field(min_length=1)
    instruction: str = Field(min_length=1)
    needs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}={self.instruction}"


class Plan(Reply):
    """The steps of a problem, in order.

    `answer_step` names the step whose result is the answer. If it is None, the workflow asks a seat for the answer.
    """

    steps: tuple[Step, ...] = Field(min_length=1)
    answer_step: str | None = None

    def __str__(self) -> str:
        return "; ".join(map(str, self.steps))

    @classmethod
    def form_schema(cls) -> dict[str, Any]:
        steps = {"type": "array", "items": {"type": "string"}}
        return {"type": "object", "properties": {"steps": steps}, "required": ["steps"]}

    @classmethod
    def from_form(cls, form: Mapping[str, Any]) -> Self:
        return cls.in_order(form["steps"])

    @classmethod
    def in_order(cls, instructions: Sequence[str]) -> Self:
        """Return a plan with steps named 1, 2, 3 and so on. Each step needs all steps before it."""
        names = [str(number) for number in range(1, len(instructions) + 1)]
        return cls(
            steps=tuple(
                Step(name=name, instruction=instruction, needs=tuple(names[:index]))
                for index, (name, instruction) in enumerate(zip(names, instructions, strict=True))
            )
        )


class Solution(Reply):
    """The result of a step, and the work that led to the result."""

    result: str = Field(min_length=1)
    work: str = ""

    def __str__(self) -> str:
        return self.result


class Verdict(Reply):
    """A judgement of a result: accepted or rejected, and why."""

    accepted: bool
    reason: str = ""

    def __str__(self) -> str:
        return ("accepted" if self.accepted else "rejected") + (f": {self.reason}" if self.reason else "")


class Answer(Reply):
    """The answer to the problem."""

    answer: str = Field(min_length=1)

    def __str__(self) -> str:
        return self.answer


class Text(Reply):
    """Free text. If the role asked for a JSON object, `values` holds the properties of the object."""

    text: str = Field(min_length=1)
    values: Mapping[str, Any] = {}

    def __str__(self) -> str:
        return self.text


class Argument(Reply):
    """A debater's answer and reasoning."""

    answer: str = Field(min_length=1)
    reasoning: str = ""

    def __str__(self) -> str:
        return self.answer

    def stated(self) -> str:
        """Return the answer with its reasoning, for the other debaters and for the judge."""
        return f"{self.answer} (because: {self.reasoning})" if self.reasoning else self.answer


class Ranking(Reply):
    """The numbers of the candidates, best first. Numbers start at 1."""

    order: tuple[int, ...] = Field(min_length=1)
    reason: str = ""

    def __str__(self) -> str:
        return " > ".join(map(str, self.order)) + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class PlanTask(Task):
    """A request to split the problem into steps."""

    kind: ClassVar[str] = "plan"
    reply_type: ClassVar[type[Reply]] = Plan

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return cls("12+7"), cls("(12+7)*3"), cls(_TRAVEL)


@dataclass(frozen=True)
class SolveTask(Task):
    """A request to solve one step.

    `results` holds the results of the steps in `step.needs`, by name. `feedback` says why the previous result was
    rejected; it is empty on the first try.
    """

    kind: ClassVar[str] = "solve"
    reply_type: ClassVar[type[Reply]] = Solution
    essential: ClassVar[str] = "step"

    step: Step
    results: Mapping[str, str] = field(default_factory=dict)
    feedback: str = ""

    def __str__(self) -> str:
        return _with_results(self.step, self.results)

    def texts(self) -> dict[str, str]:
        return {**super().texts(), "step": self.step.instruction, "results": "\n".join(result_lines(self.results))}

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (
            cls("12+7", _SUM),
            cls("(12+7)*3", _PRODUCT, {"A": "19"}),
            cls("(12+7)*3", _PRODUCT, {"A": "19"}, feedback="the inverse operation does not give it back"),
            cls("12+7", Step(name="1", instruction="Add 12 and 7.")),
            cls(_TRAVEL, _REST, {"1": "20 minutes"}),
        )


@dataclass(frozen=True)
class CritiqueTask(Task):
    """A request to judge the result of one step."""

    kind: ClassVar[str] = "critique"
    reply_type: ClassVar[type[Reply]] = Verdict
    essential: ClassVar[str] = "result"

    step: Step
    result: str
    results: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{_with_results(self.step, self.results)} gives {self.result}"

    def texts(self) -> dict[str, str]:
        return {**super().texts(), "step": self.step.instruction, "results": "\n".join(result_lines(self.results))}

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (
            cls("12+7", _SUM, "19"),
            cls("(12+7)*3", _PRODUCT, "57", {"A": "19"}),
            cls("12+7", _SUM, "nineteen"),
            cls("12+7", _SUM, "1" * 40),
            cls(_TRAVEL, _REST, "85 minutes", {"1": "20 minutes"}),
        )


@dataclass(frozen=True)
class AnswerTask(Task):
    """A request to state the answer, from the results of the steps if there are steps."""

    kind: ClassVar[str] = "answer"
    reply_type: ClassVar[type[Reply]] = Answer

    steps: tuple[Step, ...] = ()
    results: Mapping[str, str] = field(default_factory=dict)

    def texts(self) -> dict[str, str]:
        steps = [f"Step {step.name}: {step.instruction}" for step in self.steps]
        results = result_lines(self.results, self.steps)
        return {"problem": self.problem, "steps": "\n".join(steps), "results": "\n".join(results)}

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (
            cls("12+7"),
            cls("(12+7)*3", (_SUM, _PRODUCT), {"A": "19", "B": "57"}),
            cls(_TRAVEL, (_HOURS, _REST), {"1": "20 minutes", "2": "85 minutes"}),
        )


@dataclass(frozen=True)
class WriteTask(Task):
    """A request for any text, such as a draft, a summary or a program.

    `results` holds what other seats wrote. A key is the name of a seat, or of a property of a seat's reply.
    """

    kind: ClassVar[str] = "write"
    reply_type: ClassVar[type[Reply]] = Text

    results: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def examples(cls) -> Sequence[Self]:
        notes = {"researcher": "Trains count minutes from midnight.", "solver": "85 minutes"}
        return cls("12+7"), cls(_TRAVEL), cls(_TRAVEL, notes)


@dataclass(frozen=True)
class DebateTask(Task):
    """A request to answer the problem, or to revise an answer.

    `own` is the debater's last answer, and `others` are the last answers of the other debaters. Both are empty in the
    first round.
    """

    kind: ClassVar[str] = "debate"
    reply_type: ClassVar[type[Reply]] = Argument

    own: str = ""
    others: tuple[str, ...] = ()

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return cls("12+7"), cls("(12+7)*3"), cls("(12+7)*3", "57", ("57", "33")), cls(_TRAVEL, "85 minutes", ("1:25",))


@dataclass(frozen=True)
class JudgeTask(Task):
    """A request to rank candidates for the answer."""

    kind: ClassVar[str] = "judge"
    reply_type: ClassVar[type[Reply]] = Ranking
    essential: ClassVar[str] = "candidates"

    candidates: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.problem}: {', '.join(self.candidates)}"

    def texts(self) -> dict[str, str]:
        numbered = [f"{number}. {text}" for number, text in enumerate(self.candidates, start=1)]
        return {"problem": self.problem, "candidates": "\n".join(numbered)}

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return cls("(12+7)*3", ("57", "33")), cls(_TRAVEL, ("85 minutes", "65 minutes", "1:25"))


@dataclass(frozen=True)
class CompareTask(Task):
    """A request to say whether an answer means the same as the expected one."""

    kind: ClassVar[str] = "compare"
    reply_type: ClassVar[type[Reply]] = Verdict
    essential: ClassVar[str] = "answer"

    answer: str
    expected: str

    def __str__(self) -> str:
        return f"{self.answer}, where {self.expected} is expected"

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return cls("12+7", "It is 19.", "19"), cls(_TRAVEL, "85 minutes", "1 h 25 min"), cls(_TRAVEL, "1:05", "1:25")


def result_lines(results: Mapping[str, str], steps: tuple[Step, ...] = ()) -> list[str]:
    """Return one line for each result. The line has the instruction of the result's step if `steps` holds that step."""
    instructions = {step.name: f" ({step.instruction})" for step in steps}
    return [f"Result of step {name}{instructions.get(name, '')}: {result}" for name, result in results.items()]


def _with_results(step: Step, results: Mapping[str, str]) -> str:
    values = ", ".join(f"{name}={result}" for name, result in results.items())
    return f"{step.instruction} with {values}" if values else step.instruction


_HOURS = Step(name="1", instruction="Count the minutes from 9:40 to 10:00.")
_REST = Step(name="2", instruction="Add the minutes from 10:00 to 11:05.", needs=("1",))
_SUM = Step(name="A", instruction="12+7")
_PRODUCT = Step(name="B", instruction="A*3", needs=("A",))
