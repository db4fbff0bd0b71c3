"""The base class of the workflows that follow a plan."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import Field

from agents.role import Reply, Task, Value
from agents.tasks import (
    Answer,
    AnswerTask,
    CritiqueTask,
    Plan,
    PlanTask,
    Solution,
    SolveTask,
    Step,
    Verdict,
)
from agents.workflow import Entry, Outcome, RoleCall, Unusable, Workflow, wrong_type

T = TypeVar("T")


@dataclass
class StepState:
    """The progress of one step of the plan.

    `accepted` is the result with which the workflow continues, or None while the step is open. `tried` holds all
    results so far, in order. `judged` holds the verdicts on each result.
    """

    step: Step
    round: int = 0
    started: bool = False
    accepted: str | None = None
    tried: list[str] = field(default_factory=list)
    judged: dict[str, list[Verdict]] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)


class PlannedWorkflow(Workflow):
    """The base class of Deliberate and Vote: plan, solve the steps, answer.

    A step starts when the steps that it needs have results. Subclasses decide how a step is solved and judged.
    """

    class Options(Value):
        """The settings of every workflow that follows a plan."""

        plans: int = Field(
            default=1,
            ge=1,
            le=100,
            description="Plans to draw at the same time. The workflow follows the most frequent.",
        )
        critics: tuple[str, ...] = Field(
            default=("critic",), description="Seats that judge results. If the list is empty, no seat judges."
        )
        answerer: str = Field(
            default="solver",
            description="The seat that states the answer if the plan does not name the step that gives it.",
        )

    options: Options

    @classmethod
    def seats(cls, options: Value) -> Mapping[str, tuple[type[Task], ...]]:
        assert isinstance(options, PlannedWorkflow.Options)
        calls: list[tuple[str, type[Task]]] = [("planner", PlanTask), ("solver", SolveTask)]
        calls += [(critic, CritiqueTask) for critic in options.critics]
        calls.append((options.answerer, AnswerTask))
        return {seat: tuple(task for name, task in calls if name == seat) for seat, _ in calls}

    def __init__(self, problem: str, options: Value) -> None:
        super().__init__(problem, options)
        self._plans: list[Plan] = []
        self._plan: Plan | None = None
        self._steps: dict[str, StepState] = {}
        self._confirmed: bool | None = None

    def begin(self) -> list[RoleCall]:
        return [self.ask("planner", PlanTask(self.problem), variation=n) for n in range(self.options.plans)]

    def take(self, call: RoleCall, reply: Reply | Unusable) -> list[RoleCall]:
        if self.outcome:
            return []  # the problem failed while the call was open
        if isinstance(reply, Plan):
            fault = plan_fault(reply)
            reply = Unusable(fault) if fault else reply
        if isinstance(reply, Unusable):
            return self.retry(call, reply)
        match call.task, reply:
            case PlanTask(), Plan():
                self.record(call, reply)
                return self._planned(reply)
            case SolveTask(step=step), Solution():
                return self._solved(self._steps[step.name], call, reply)
            case CritiqueTask(step=step, result=result), Verdict():
                state = self._steps[step.name]
                self.record(call, reply, verdict_word(reply.accepted), state.round)
                return self._judged(state, result, reply)
            case AnswerTask(), Answer():
                self.record(call, reply)
                return self._end(reply.answer)
            case _:
                raise wrong_type(call.task, reply)

    def _planned(self, plan: Plan) -> list[RoleCall]:
        """Accept a plan. When all plans have arrived, start the most frequent one."""
        self._plans.append(plan)
        if len(self._plans) < self.options.plans:
            return []
        self._plan = most_common(self._plans)
        self._steps = {step.name: StepState(step) for step in self._plan.steps}
        return self._start_ready()

    @abstractmethod
    def _start(self, state: StepState) -> list[RoleCall]:
        """Return the first calls of a step whose needed steps have results."""

    @abstractmethod
    def _certain(self, state: StepState) -> Mapping[str, int]:
        """Return how many calls of each seat are certain to follow the open calls, for an unfinished step."""

    def ahead(self) -> Mapping[str, int] | None:
        if self._plan is None:
            return {} if self.outcome else None
        calls: Counter[str] = Counter()
        for state in self._steps.values():
            if state.accepted is None:
                calls.update(self._certain(state))
        if self._plan.answer_step is None and calls:
            calls[self.options.answerer] += 1
        return {} if self.outcome else calls

    @abstractmethod
    def _solved(self, state: StepState, call: RoleCall, reply: Solution) -> list[RoleCall]:
        """Accept a solution of the step and return the next calls."""

    @abstractmethod
    def _judged(self, state: StepState, result: str, verdict: Verdict) -> list[RoleCall]:
        """Accept a verdict on one of the step's results and return the next calls."""

    def _start_ready(self) -> list[RoleCall]:
        """Start every step whose needed steps have results. If all steps have results, answer."""
        assert self._plan is not None
        calls = []
        for state in self._steps.values():
            if not state.started and all(self._steps[need].accepted is not None for need in state.step.needs):
                state.started = True
                calls += self._start(state)
        if any(state.accepted is None for state in self._steps.values()):
            return calls
        if self._plan.answer_step:
            return self._end(self._results([self._plan.answer_step])[self._plan.answer_step])
        return [self.ask(self.options.answerer, AnswerTask(self.problem, self._plan.steps, self._results(self._steps)))]

    def _solve(self, state: StepState, feedback: str = "", variation: int = 0) -> RoleCall:
        task = SolveTask(self.problem, state.step, self._results(state.step.needs), feedback)
        return self.ask("solver", task, variation)

    def _critique(self, state: StepState, result: str, critics: Iterable[str]) -> list[RoleCall]:
        task = CritiqueTask(self.problem, state.step, result, self._results(state.step.needs))
        return [self.ask(critic, task) for critic in critics]

    def _results(self, names: Iterable[str]) -> dict[str, str]:
        return {name: result for name in names if (result := self._steps[name].accepted) is not None}

    def _record_solution(self, state: StepState, call: RoleCall, reply: Solution) -> None:
        state.tried.append(reply.result)
        state.entries.append(self.record(call, reply, revisions=state.round))

    def _settle(self, state: StepState, result: str, confirmed: bool | None) -> list[RoleCall]:
        state.accepted = result
        if confirmed is not None:
            self._confirmed = self._confirmed is not False and confirmed
        return self._start_ready()

    def _end(self, answer: str) -> list[RoleCall]:
        self.outcome = Outcome(answer, self._confirmed, self.rounds)
        return []


def plan_fault(plan: Plan) -> str | None:
    """Return what is wrong with the step names in a plan, or None if the workflow can follow the plan."""
    earlier: set[str] = set()
    for step in plan.steps:
        if step.name in earlier:
            return f"two steps are named {step.name}"
        if missing := set(step.needs) - earlier:
            return f"step {step.name} needs {', '.join(sorted(missing))}; needs must name earlier steps"
        earlier.add(step.name)
    if plan.answer_step is not None and plan.answer_step not in earlier:
        return f"answer_step is {plan.answer_step}; it must name a step of the plan"
    return None


def verdict_word(accepted: bool) -> str:
    return "accepted" if accepted else "rejected"


def most_common(values: list[T]) -> T:
    """Return the most frequent value. If several are equally frequent, return the one that occurs last."""
    return max(reversed(values), key=values.count)
