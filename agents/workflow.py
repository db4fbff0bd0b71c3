"""How a team works a problem: pure state machines that ask for role calls and take their replies.

A Workflow is made for one problem. `begin` and `take` return the calls that are now due, any number of which may be
open at once; when none is open, `outcome` is set. There is no clock, no I/O and no chance in here, so the same
replies in the same order lead to the same state: a job is resumed by taking its recorded replies again.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from pydantic import Field

from agents.role import (
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
"""How often one call is asked again after replies that cannot be read."""


@dataclass(frozen=True)
class RoleCall:
    """One question to one seat of the team. `variation` above 0 asks for another answer than the likeliest."""

    number: int
    seat: str
    task: Task
    variation: int = 0
    retries: int = 0


@dataclass(frozen=True)
class Unusable:
    """In a reply's place: the model's text could not be read, and why."""

    why: str


@dataclass
class Entry:
    """One line of the transcript. `verdict` is "accepted" or "rejected" once somebody judged it."""

    seat: str
    input: str
    output: str
    verdict: str | None = None
    round: int = 0


@dataclass(frozen=True)
class Outcome:
    """How the problem ended: an answer, or the reason for none.

    `confirmed` when critics accepted every step, not when one stayed rejected; None where nobody judged.
    """

    answer: str | None
    confirmed: bool | None
    rounds: int
    failure: str | None = None


class Workflow(ABC):
    """One problem on its way through a team.

    `Options` are its settings in a configuration; `seats` names the members of the team that those settings call on.
    """

    class Options(Value):
        """A workflow without settings."""

    def __init__(self, problem: str, options: Value) -> None:
        self.problem = problem
        self.options = options
        self.transcript: list[Entry] = []
        self.outcome: Outcome | None = None
        self.rounds = 0
        self._numbers = 0

    @classmethod
    @abstractmethod
    def seats(cls, options: Value) -> Mapping[str, tuple[type[Task], ...]]:
        """The seats that the workflow calls on, and the kinds of task that each must take."""

    @abstractmethod
    def begin(self) -> list[RoleCall]:
        """The first calls."""

    @abstractmethod
    def take(self, call: RoleCall, reply: Reply | Unusable) -> list[RoleCall]:
        """Take the reply to one open call; return the calls that are now due."""

    def ahead(self) -> Mapping[str, int] | None:
        """The calls, by seat, that are certain to come after those that are open; None while that is not known.

        Memory is moved ahead of them. A workflow that never knows leaves it at None.
        """
        return None

    def _call(self, seat: str, task: Task, variation: int = 0) -> RoleCall:
        self._numbers += 1
        return RoleCall(self._numbers, seat, task, variation)

    def _again(self, call: RoleCall, reply: Unusable) -> list[RoleCall]:
        """Ask once more after an unusable reply, or fail the problem when that was the last try."""
        self.transcript.append(Entry(call.seat, str(call.task), f"unusable: {reply.why}", "rejected", call.retries))
        if call.retries + 1 >= UNUSABLE_MAX:
            return self._fail(f"the {call.seat}'s reply could not be read {UNUSABLE_MAX} times: {reply.why}")
        self._numbers += 1
        return [replace(call, number=self._numbers, variation=call.variation + 1, retries=call.retries + 1)]

    def _fail(self, why: str) -> list[RoleCall]:
        self.outcome = self.outcome or Outcome(None, None, self.rounds, why)
        return []


@dataclass
class _StepState:
    """One step of the plan while it is worked."""

    step: Step
    round: int = 0
    started: bool = False
    accepted: str | None = None
    tried: list[str] = field(default_factory=list)
    judged: dict[str, list[Verdict]] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)


class PlannedWorkflow(Workflow):
    """What deliberation and voting share: plan, work the steps whose needs are met, answer."""

    class Options(Value):
        """`critics` are the seats that judge; `answerer` the one that states the answer where the plan does not say
        which step gives it. Of several `plans`, drawn at the same time, the one found most often is followed."""

        plans: int = Field(default=1, ge=1, le=100)
        critics: tuple[str, ...] = ("critic",)
        answerer: str = "solver"

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
        return [self._call("planner", PlanTask(self.problem), variation=n) for n in range(self.options.plans)]

    def take(self, call: RoleCall, reply: Reply | Unusable) -> list[RoleCall]:
        if self.outcome:
            return []  # replies that were still open when the problem failed
        if isinstance(reply, Plan):
            fault = plan_fault(reply)
            reply = Unusable(fault) if fault else reply
        if isinstance(reply, Unusable):
            return self._again(call, reply)
        match call.task, reply:
            case PlanTask(), Plan():
                self.transcript.append(Entry(call.seat, str(call.task), str(reply)))
                return self._planned(reply)
            case SolveTask(step=step), Solution():
                return self._solved(self._steps[step.name], call, reply)
            case CritiqueTask(step=step, result=result), Verdict():
                self.transcript.append(
                    Entry(call.seat, str(call.task), str(reply), _word(reply.accepted), self._steps[step.name].round)
                )
                return self._judged(self._steps[step.name], result, reply)
            case AnswerTask(), Answer():
                self.transcript.append(Entry(call.seat, str(call.task), str(reply)))
                return self._end(reply.answer)
            case _:
                return self._again(
                    call, Unusable(f"a {type(reply).__name__} came back for a {type(call.task).__name__}")
                )

    def _planned(self, plan: Plan) -> list[RoleCall]:
        """A plan has come; the last one decides which is followed."""
        self._plans.append(plan)
        if len(self._plans) < self.options.plans:
            return []
        self._plan = _most_common(self._plans)
        self._steps = {step.name: _StepState(step) for step in self._plan.steps}
        return self._due()

    @abstractmethod
    def _start(self, state: _StepState) -> list[RoleCall]:
        """The first calls for a step whose needs are met."""

    @abstractmethod
    def _certain(self, state: _StepState) -> Mapping[str, int]:
        """The calls for a step that are certain to come after those that are open, by seat."""

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
        """A solution of the step has come."""

    @abstractmethod
    def _judged(self, state: _StepState, result: str, verdict: Verdict) -> list[RoleCall]:
        """A verdict on one of the step's results has come."""

    def _due(self) -> list[RoleCall]:
        """Start every step whose needs are met; when all are done, answer."""
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
        return [
            self._call(self.options.answerer, AnswerTask(self.problem, self._plan.steps, self._results(self._steps)))
        ]

    def _solve(self, state: _StepState, feedback: str = "", variation: int = 0) -> RoleCall:
        task = SolveTask(self.problem, state.step, self._results(state.step.needs), feedback)
        return self._call("solver", task, variation)

    def _critique(self, state: _StepState, result: str, critics: Iterable[str]) -> list[RoleCall]:
        task = CritiqueTask(self.problem, state.step, result, self._results(state.step.needs))
        return [self._call(critic, task) for critic in critics]

    def _results(self, names: Iterable[str]) -> dict[str, str]:
        return {name: result for name in names if (result := self._steps[name].accepted) is not None}

    def _record(self, state: _StepState, call: RoleCall, reply: Solution) -> None:
        entry = Entry(call.seat, str(call.task), str(reply), None, state.round)
        self.transcript.append(entry)
        state.tried.append(reply.result)
        state.entries.append(entry)

    def _settle(self, state: _StepState, result: str, confirmed: bool | None) -> list[RoleCall]:
        state.accepted = result
        if confirmed is not None:
            self._confirmed = self._confirmed is not False and confirmed
        return self._due()

    def _end(self, answer: str) -> list[RoleCall]:
        self.outcome = Outcome(answer, self._confirmed, self.rounds)
        return []


class Deliberate(PlannedWorkflow):
    """Plan, solve each step, criticise, revise what was rejected (bounded rounds), answer.

    Steps that do not wait for one another are worked at the same time. A result stands when every critic accepts it.
    When the last round's is rejected too, the result that was found most often goes on, unconfirmed.
    """

    class Options(PlannedWorkflow.Options):
        """`rounds` of revision for a step at most; no `critics` make an unchecked team."""

        rounds: int = Field(default=3, ge=0, le=100)

    options: Options

    def _start(self, state: _StepState) -> list[RoleCall]:
        return [self._solve(state)]

    def _certain(self, state: _StepState) -> Mapping[str, int]:
        calls = Counter(self.options.critics if len(state.tried) <= state.round else ())
        if not state.started:
            calls["solver"] += 1
        return calls

    def _solved(self, state: _StepState, call: RoleCall, reply: Solution) -> list[RoleCall]:
        self._record(state, call, reply)
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
        state.entries[-1].verdict = _word(accepted)
        if accepted:
            return self._settle(state, result, confirmed=True)
        if state.round == self.options.rounds:
            return self._settle(state, _most_common(state.tried), confirmed=False)
        state.round += 1
        self.rounds = max(self.rounds, state.round)
        feedback = "; ".join(v.reason for v in verdicts if not v.accepted and v.reason)
        return [self._solve(state, feedback or "the critic rejected it", variation=state.round)]


class Vote(PlannedWorkflow):
    """Plan, then several sampled solutions of every step; the critic checks each distinct one and so chooses.

    Of the results that every critic accepts, the one with the most votes goes on; when none is accepted, the one with
    the most votes does, unconfirmed.
    """

    class Options(PlannedWorkflow.Options):
        """`samples` solutions of each step."""

        samples: int = Field(default=3, ge=1, le=100)
        critics: tuple[str, ...] = Field(default=("critic",), min_length=1)

    options: Options

    def _start(self, state: _StepState) -> list[RoleCall]:
        return [self._solve(state, variation=sample) for sample in range(1, self.options.samples + 1)]

    def _certain(self, state: _StepState) -> Mapping[str, int]:
        calls = Counter(self.options.critics if len(state.tried) < self.options.samples else ())
        if not state.started:
            calls["solver"] += self.options.samples
        return calls

    def _solved(self, state: _StepState, call: RoleCall, reply: Solution) -> list[RoleCall]:
        self._record(state, call, reply)
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
            entry.verdict = _word(tried in accepted)
        return self._settle(state, _most_common(accepted or state.tried), confirmed=bool(accepted))


class Solo(Workflow):
    """The solver answers at once, without plan or critic: what a team has to be better than."""

    @classmethod
    def seats(cls, options: Value) -> Mapping[str, tuple[type[Task], ...]]:
        return {"solver": (AnswerTask,)}

    def ahead(self) -> Mapping[str, int]:
        return {}

    def begin(self) -> list[RoleCall]:
        return [self._call("solver", AnswerTask(self.problem))]

    def take(self, call: RoleCall, reply: Reply | Unusable) -> list[RoleCall]:
        if not isinstance(reply, Answer):
            return self._again(call, reply if isinstance(reply, Unusable) else Unusable("no answer came back"))
        self.transcript.append(Entry(call.seat, str(call.task), str(reply)))
        self.outcome = Outcome(reply.answer, None, 0)
        return []


def plan_fault(plan: Plan) -> str | None:
    """What keeps a plan from being worked: a name twice, a need that is no earlier step, no step to answer from."""
    seen: set[str] = set()
    for step in plan.steps:
        if step.name in seen:
            return f"step {step.name} comes twice"
        if missing := set(step.needs) - seen:
            return f"step {step.name} needs {', '.join(sorted(missing))}, which no earlier step gives"
        seen.add(step.name)
    if plan.answer_step is not None and plan.answer_step not in seen:
        return f"the answer is to come from {plan.answer_step}, which is no step of the plan"
    return None


def _word(accepted: bool) -> str:
    return "accepted" if accepted else "rejected"


def _most_common(found: list[T]) -> T:
    """What was found most often; of those, the one found last."""
    return max(reversed(found), key=found.count)
