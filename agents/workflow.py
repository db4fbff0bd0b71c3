"""Workflows: state machines that decide whom to ask next while a team solves a problem.

A Workflow object belongs to one problem. `begin` and `take` return the calls to make next. Any number of calls can be
open at once; when no call is open, `outcome` is set. A workflow uses no clock, no I/O and no randomness, so the same
replies in the same order lead to the same state. The runtime resumes a job by feeding it its recorded replies again.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from pydantic import Field

from agents.role import (
    REPLIES,
    Answer,
    AnswerTask,
    CritiqueTask,
    Plan,
    PlanTask,
    Reply,
    Solution,
    SolveTask,
    Step,
    Task,
    Value,
    Verdict,
)

T = TypeVar("T")

UNUSABLE_MAX = 3
"""A problem fails after this many unusable replies to one call."""


@dataclass(frozen=True)
class RoleCall:
    """One question to one seat of the team.

    `number` identifies the call within its workflow. If `variation` is above 0, the reply is sampled at a higher
    temperature, to get another one than the most likely. `retries` counts the unusable replies to this call so far.
    """

    number: int
    seat: str
    task: Task
    variation: int = 0
    retries: int = 0


@dataclass(frozen=True)
class Unusable:
    """A stand-in for a reply whose text could not be read. `why` is the reason."""

    why: str


@dataclass
class Entry:
    """One line of the transcript: what a seat was asked and what it replied.

    `verdict` is None until the output is judged, then "accepted" or "rejected". `round` counts the revisions of the
    step before this entry, or the tries before an unusable reply.
    """

    seat: str
    input: str
    output: str
    verdict: str | None = None
    round: int = 0


@dataclass(frozen=True)
class Outcome:
    """The end of a problem: an answer, or the reason why there is none.

    `confirmed` is True if the critics accepted every step, False if the result of some step stayed rejected, and None
    if no critic judged anything. `rounds` is the most revisions that any step needed. `failure` is set if `answer` is
    None.
    """

    answer: str | None
    confirmed: bool | None
    rounds: int
    failure: str | None = None


class Workflow(ABC):
    """The base class of workflows. An object holds the state of one problem.

    `Options` describes the workflow's settings in a configuration. `transcript` and `outcome` are what users see.
    Subclasses use `ask`, `retry` and `fail` to create what `begin` and `take` return, and `record` for the transcript.
    """

    class Options(Value):
        """The settings of a workflow that has none."""

    def __init__(self, problem: str, options: Value) -> None:
        self.problem = problem
        self.options = options
        self.transcript: list[Entry] = []
        self.outcome: Outcome | None = None
        self.rounds = 0
        self._last_number = 0

    @classmethod
    @abstractmethod
    def seats(cls, options: Value) -> Mapping[str, tuple[type[Task], ...]]:
        """Return the seats that the workflow calls, and the kinds of task that each seat's role must take."""

    @abstractmethod
    def begin(self) -> list[RoleCall]:
        """Return the first calls."""

    @abstractmethod
    def take(self, call: RoleCall, reply: Reply | Unusable) -> list[RoleCall]:
        """Accept the reply to an open call and return the calls to make next."""

    def ahead(self) -> Mapping[str, int] | None:
        """Return how many more calls, by seat, are certain to follow the open ones, or None if that is unknown.

        The controller moves memory to the engines of these seats before the calls are made.
        """
        return None

    def ask(self, seat: str, task: Task, variation: int = 0) -> RoleCall:
        """Return a new call, for `begin` or `take` to return."""
        self._last_number += 1
        return RoleCall(self._last_number, seat, task, variation)

    def record(self, call: RoleCall, reply: Reply, verdict: str | None = None, revisions: int = 0) -> Entry:
        """Append a reply to the transcript and return its entry. `revisions` counts those of the step so far."""
        entry = Entry(call.seat, str(call.task), str(reply), verdict, revisions)
        self.transcript.append(entry)
        return entry

    def retry(self, call: RoleCall, reply: Unusable) -> list[RoleCall]:
        """Return the same call again after an unusable reply, or fail the problem if that was the last try."""
        self.transcript.append(Entry(call.seat, str(call.task), f"unusable: {reply.why}", "rejected", call.retries))
        if call.retries + 1 >= UNUSABLE_MAX:
            return self.fail(f"the {call.seat}'s reply could not be read {UNUSABLE_MAX} times: {reply.why}")
        self._last_number += 1
        return [replace(call, number=self._last_number, variation=call.variation + 1, retries=call.retries + 1)]

    def fail(self, why: str) -> list[RoleCall]:
        """End the problem without an answer, unless it has ended already. Return no calls."""
        self.outcome = self.outcome or Outcome(None, None, self.rounds, why)
        return []


@dataclass
class _StepState:
    """The progress of one step of the plan."""

    step: Step
    round: int = 0
    started: bool = False
    accepted: str | None = None
    tried: list[str] = field(default_factory=list)
    judged: dict[str, list[Verdict]] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)


class PlannedWorkflow(Workflow):
    """The base of Deliberate and Vote: plan, solve each step once the steps that it needs are accepted, answer.

    Subclasses decide how a step is solved and judged.
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
            default=("critic",), description="Seats that judge results. Without any, none does."
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
        self._steps: dict[str, _StepState] = {}
        self._confirmed: bool | None = None

    def begin(self) -> list[RoleCall]:
        return [self.ask("planner", PlanTask(self.problem), variation=n) for n in range(self.options.plans)]

    def take(self, call: RoleCall, reply: Reply | Unusable) -> list[RoleCall]:
        if self.outcome:
            return []  # the problem failed while this call was open
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
                self.record(call, reply, _verdict_word(reply.accepted), state.round)
                return self._judged(state, result, reply)
            case AnswerTask(), Answer():
                self.record(call, reply)
                return self._end(reply.answer)
            case _:
                return self.retry(call, _wrong_type(call.task, reply))

    def _planned(self, plan: Plan) -> list[RoleCall]:
        """Accept a plan. Once all plans are there, start the most frequent one."""
        self._plans.append(plan)
        if len(self._plans) < self.options.plans:
            return []
        self._plan = _most_common(self._plans)
        self._steps = {step.name: _StepState(step) for step in self._plan.steps}
        return self._start_ready()

    @abstractmethod
    def _start(self, state: _StepState) -> list[RoleCall]:
        """Return the first calls of a step whose needs are met."""

    @abstractmethod
    def _certain(self, state: _StepState) -> Mapping[str, int]:
        """Return how many more calls of an unfinished step, by seat, are certain to follow the open ones."""

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
    def _solved(self, state: _StepState, call: RoleCall, reply: Solution) -> list[RoleCall]:
        """Accept a solution of the step and return the next calls."""

    @abstractmethod
    def _judged(self, state: _StepState, result: str, verdict: Verdict) -> list[RoleCall]:
        """Accept a verdict on one of the step's results and return the next calls."""

    def _start_ready(self) -> list[RoleCall]:
        """Start every step whose needs are met. If all steps are finished, answer."""
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

    def _solve(self, state: _StepState, feedback: str = "", variation: int = 0) -> RoleCall:
        task = SolveTask(self.problem, state.step, self._results(state.step.needs), feedback)
        return self.ask("solver", task, variation)

    def _critique(self, state: _StepState, result: str, critics: Iterable[str]) -> list[RoleCall]:
        task = CritiqueTask(self.problem, state.step, result, self._results(state.step.needs))
        return [self.ask(critic, task) for critic in critics]

    def _results(self, names: Iterable[str]) -> dict[str, str]:
        return {name: result for name in names if (result := self._steps[name].accepted) is not None}

    def _record_solution(self, state: _StepState, call: RoleCall, reply: Solution) -> None:
        state.tried.append(reply.result)
        state.entries.append(self.record(call, reply, revisions=state.round))

    def _settle(self, state: _StepState, result: str, confirmed: bool | None) -> list[RoleCall]:
        state.accepted = result
        if confirmed is not None:
            self._confirmed = self._confirmed is not False and confirmed
        return self._start_ready()

    def _end(self, answer: str) -> list[RoleCall]:
        self.outcome = Outcome(answer, self._confirmed, self.rounds)
        return []


class Deliberate(PlannedWorkflow):
    """Deliberation: plan, solve each step, let critics judge the result, revise what they reject, answer.

    Independent steps are solved at the same time. A result is accepted if every critic accepts it. If the result of the
    last round is rejected too, the workflow continues with the most frequent result and ends unconfirmed.
    """

    class Options(PlannedWorkflow.Options):
        """The settings of `deliberate`."""

        rounds: int = Field(default=3, ge=0, le=100, description="How often a rejected step is solved again at most.")

    options: Options

    def _start(self, state: _StepState) -> list[RoleCall]:
        return [self._solve(state)]

    def _certain(self, state: _StepState) -> Mapping[str, int]:
        calls = Counter(self.options.critics if len(state.tried) <= state.round else ())
        if not state.started:
            calls["solver"] += 1
        return calls

    def _solved(self, state: _StepState, call: RoleCall, reply: Solution) -> list[RoleCall]:
        self._record_solution(state, call, reply)
        if not self.options.critics:
            return self._settle(state, reply.result, confirmed=None)
        state.judged[reply.result] = []
        return self._critique(state, reply.result, self.options.critics)

    def _judged(self, state: _StepState, result: str, verdict: Verdict) -> list[RoleCall]:
        verdicts = state.judged[result]
        verdicts.append(verdict)
        if len(verdicts) < len(self.options.critics):
            return []
        accepted = all(v.accepted for v in verdicts)
        state.entries[-1].verdict = _verdict_word(accepted)
        if accepted:
            return self._settle(state, result, confirmed=True)
        if state.round == self.options.rounds:
            return self._settle(state, _most_common(state.tried), confirmed=False)
        state.round += 1
        self.rounds = max(self.rounds, state.round)
        feedback = "; ".join(v.reason for v in verdicts if not v.accepted and v.reason)
        return [self._solve(state, feedback or "the critic rejected it", variation=state.round)]


class Vote(PlannedWorkflow):
    """A vote: plan, solve each step several times, let critics judge each distinct result, take the majority.

    The critics judge each distinct result once. The workflow continues with the most frequent result among those that
    every critic accepts. If none is accepted, it continues with the most frequent of all and ends unconfirmed.
    """

    class Options(PlannedWorkflow.Options):
        """The settings of `vote`."""

        samples: int = Field(default=3, ge=1, le=100, description="How often each step is solved.")
        critics: tuple[str, ...] = Field(
            default=("critic",), min_length=1, description="Seats that judge the samples, at least one."
        )

    options: Options

    def _start(self, state: _StepState) -> list[RoleCall]:
        return [self._solve(state, variation=sample) for sample in range(1, self.options.samples + 1)]

    def _certain(self, state: _StepState) -> Mapping[str, int]:
        calls = Counter(self.options.critics if len(state.tried) < self.options.samples else ())
        if not state.started:
            calls["solver"] += self.options.samples
        return calls

    def _solved(self, state: _StepState, call: RoleCall, reply: Solution) -> list[RoleCall]:
        self._record_solution(state, call, reply)
        if len(state.tried) < self.options.samples:
            return []
        state.judged = {result: [] for result in state.tried}
        return [c for result in state.judged for c in self._critique(state, result, self.options.critics)]

    def _judged(self, state: _StepState, result: str, verdict: Verdict) -> list[RoleCall]:
        state.judged[result].append(verdict)
        if any(len(verdicts) < len(self.options.critics) for verdicts in state.judged.values()):
            return []
        accepted = [r for r in state.tried if all(v.accepted for v in state.judged[r])]
        for tried, entry in zip(state.tried, state.entries, strict=True):
            entry.verdict = _verdict_word(tried in accepted)
        return self._settle(state, _most_common(accepted or state.tried), confirmed=bool(accepted))


class Solo(Workflow):
    """The solver alone, which answers without plan or critic: the baseline that a team has to beat."""

    @classmethod
    def seats(cls, options: Value) -> Mapping[str, tuple[type[Task], ...]]:
        return {"solver": (AnswerTask,)}

    def ahead(self) -> Mapping[str, int]:
        return {}

    def begin(self) -> list[RoleCall]:
        return [self.ask("solver", AnswerTask(self.problem))]

    def take(self, call: RoleCall, reply: Reply | Unusable) -> list[RoleCall]:
        if isinstance(reply, Unusable):
            return self.retry(call, reply)
        if not isinstance(reply, Answer):
            return self.retry(call, _wrong_type(call.task, reply))
        self.record(call, reply)
        self.outcome = Outcome(reply.answer, None, 0)
        return []


def plan_fault(plan: Plan) -> str | None:
    """Return what is wrong with the names in a plan, or None if it can be followed."""
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


def _wrong_type(task: Task, reply: Reply) -> Unusable:
    expected = REPLIES[type(task)].__name__
    return Unusable(f"the reply to {type(task).__name__} must be {expected}, not {type(reply).__name__}")


def _verdict_word(accepted: bool) -> str:
    return "accepted" if accepted else "rejected"


def _most_common(values: list[T]) -> T:
    """Return the most frequent value. Among equally frequent ones, return the one that occurs last."""
    return max(reversed(values), key=values.count)
