"""The workflows as state machines, with replies written in the tests: their calls, their order and their outcomes."""

import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from agents.role import Reply, Task, Value
from agents.tasks import Answer, AnswerTask, CritiqueTask, Plan, PlanTask, Solution, SolveTask, Step, Verdict
from agents.workflow import UNUSABLE_MAX, Outcome, RoleCall, Unusable, Workflow
from agents.workflows.deliberate import Deliberate
from agents.workflows.planned import plan_fault
from agents.workflows.solo import Solo
from agents.workflows.vote import Vote

PROBLEM = "(12+7)*(9-4)"
A = Step(name="A", instruction="12+7")
B = Step(name="B", instruction="9-4")
C = Step(name="C", instruction="A*B", needs=("A", "B"))
PLAN = Plan(steps=(A, B, C), answer_step="C")
CHAIN = Plan(steps=(A,))

Answering = Callable[[RoleCall], Reply | Unusable]


@dataclass
class Team:
    """A team that replies by rule.

    `results` holds the successive results of each step. `wrong` maps each rejected result to the reason.
    """

    plan: Plan = PLAN
    results: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"A": ["19"], "B": ["5"], "C": ["95"]})
    wrong: Mapping[str, str] = field(default_factory=dict)
    answer: str = "95"
    _solved: Counter[str] = field(default_factory=Counter)

    def __call__(self, call: RoleCall) -> Reply | Unusable:
        match call.task:
            case PlanTask():
                return self.plan
            case SolveTask(step=step):
                results = self.results[step.name]
                self._solved[step.name] += 1
                return Solution(result=results[min(self._solved[step.name], len(results)) - 1])
            case CritiqueTask(result=result):
                return Verdict(accepted=result not in self.wrong, reason=self.wrong.get(result, ""))
            case _:
                return Answer(answer=self.answer)


def drive(workflow: Workflow, team: Answering) -> list[RoleCall]:
    """Answer every call in order until the workflow ends. Return the calls in the order in which it made them."""
    calls = list(workflow.begin())
    open_calls = deque(calls)
    while open_calls:
        assert workflow.outcome is None
        call = open_calls.popleft()
        new = workflow.take(call, team(call))
        calls += new
        open_calls += new
    assert workflow.outcome is not None
    return calls


def deliberate(**options: object) -> Deliberate:
    return Deliberate(PROBLEM, Deliberate.Options.model_validate(options))


def vote(**options: object) -> Vote:
    return Vote(PROBLEM, Vote.Options.model_validate(options))


def solves(calls: Sequence[RoleCall], step: str) -> list[tuple[SolveTask, int]]:
    return [(c.task, c.variation) for c in calls if isinstance(c.task, SolveTask) and c.task.step.name == step]


# Deliberate


def test_deliberation_plans_solves_judges_and_answers() -> None:
    workflow = deliberate()
    calls = drive(workflow, Team())
    assert [(call.seat, call.task) for call in calls] == [
        ("planner", PlanTask(PROBLEM)),
        ("solver", SolveTask(PROBLEM, A)),
        ("solver", SolveTask(PROBLEM, B)),
        ("critic", CritiqueTask(PROBLEM, A, "19")),
        ("critic", CritiqueTask(PROBLEM, B, "5")),
        ("solver", SolveTask(PROBLEM, C, {"A": "19", "B": "5"})),
        ("critic", CritiqueTask(PROBLEM, C, "95", {"A": "19", "B": "5"})),
    ]
    assert workflow.outcome == Outcome("95", confirmed=True, rounds=0)
    assert [(e.seat, e.input) for e in workflow.transcript] == [(call.seat, str(call.task)) for call in calls]
    assert [(e.output, e.verdict) for e in workflow.transcript] == [
        ("A=12+7; B=9-4; C=A*B", None),
        ("19", "accepted"),
        ("5", "accepted"),
        ("accepted", "accepted"),
        ("accepted", "accepted"),
        ("95", "accepted"),
        ("accepted", "accepted"),
    ]


def test_independent_steps_are_solved_at_the_same_time() -> None:
    workflow = deliberate()
    [plan] = workflow.begin()
    first = workflow.take(plan, PLAN)
    assert [call.task for call in first] == [SolveTask(PROBLEM, A), SolveTask(PROBLEM, B)]
    [judge_b] = workflow.take(first[1], Solution(result="5"))
    assert workflow.take(judge_b, Verdict(accepted=True)) == []
    [judge_a] = workflow.take(first[0], Solution(result="19"))
    [last] = workflow.take(judge_a, Verdict(accepted=True))
    assert last.task == SolveTask(PROBLEM, C, {"A": "19", "B": "5"})


def test_rejected_step_is_solved_again_with_feedback_and_another_variation() -> None:
    workflow = deliberate()
    calls = drive(workflow, Team(results={"A": ["18", "19"], "B": ["5"], "C": ["95"]}, wrong={"18": "18-7 is 11"}))
    assert solves(calls, "A") == [(SolveTask(PROBLEM, A), 0), (SolveTask(PROBLEM, A, feedback="18-7 is 11"), 1)]
    assert workflow.outcome == Outcome("95", confirmed=True, rounds=1)
    solver = [(e.output, e.verdict, e.round) for e in workflow.transcript if e.input == "12+7"]
    assert solver == [("18", "rejected", 0), ("19", "accepted", 1)]


def test_rejection_without_a_reason_gives_default_feedback() -> None:
    calls = drive(deliberate(), Team(results={"A": ["18", "19"], "B": ["5"], "C": ["95"]}, wrong={"18": ""}))
    assert solves(calls, "A")[1][0].feedback == "the critic rejected it"


@pytest.mark.parametrize(("tried", "chosen"), [(["17", "18", "18", "16"], "18"), (["17", "18", "16"], "16")])
def test_last_round_ends_with_the_most_frequent_result_unconfirmed(tried: list[str], chosen: str) -> None:
    workflow = deliberate(rounds=len(tried) - 1)
    calls = drive(workflow, Team(CHAIN, {"A": tried}, dict.fromkeys(tried, "no"), answer=chosen))
    assert [variation for _, variation in solves(calls, "A")] == list(range(len(tried)))
    assert calls[-1].task == AnswerTask(PROBLEM, (A,), {"A": chosen})
    assert workflow.outcome == Outcome(chosen, confirmed=False, rounds=len(tried) - 1)


def test_without_rounds_a_rejected_result_is_used_unconfirmed() -> None:
    workflow = deliberate(rounds=0)
    drive(workflow, Team(wrong={"19": "no"}))
    assert workflow.outcome == Outcome("95", confirmed=False, rounds=0)


def test_without_critics_nothing_is_judged() -> None:
    workflow = deliberate(critics=[])
    assert {call.seat for call in drive(workflow, Team())} == {"planner", "solver"}
    assert workflow.outcome == Outcome("95", confirmed=None, rounds=0)
    assert {entry.verdict for entry in workflow.transcript} == {None}


def test_result_is_accepted_only_if_every_critic_accepts_it() -> None:
    def team(call: RoleCall) -> Reply | Unusable:
        if call.seat == "second" and isinstance(call.task, CritiqueTask):
            return Verdict(accepted=call.task.result != "18", reason="second thoughts")
        return inner(call)

    inner = Team(results={"A": ["18", "19"], "B": ["5"], "C": ["95"]})
    workflow = deliberate(critics=["critic", "second"])
    calls = drive(workflow, team)
    assert solves(calls, "A")[1][0].feedback == "second thoughts"
    assert workflow.outcome == Outcome("95", confirmed=True, rounds=1)
    assert [c.seat for c in calls if c.task == CritiqueTask(PROBLEM, A, "18")] == ["critic", "second"]


def test_without_an_answer_step_the_solver_states_the_answer() -> None:
    workflow = deliberate()
    plan = PLAN.model_copy(update={"answer_step": None})
    calls = drive(workflow, Team(plan, answer="ninety-five"))
    assert calls[-1].seat == "solver"
    assert calls[-1].task == AnswerTask(PROBLEM, (A, B, C), {"A": "19", "B": "5", "C": "95"})
    assert workflow.outcome == Outcome("ninety-five", confirmed=True, rounds=0)


# Unusable replies


def unusable_times(times: int, seat: str, team: Answering) -> Answering:
    """Return the team with a `seat` whose first `times` replies are unusable."""
    remaining = times

    def answer(call: RoleCall) -> Reply | Unusable:
        nonlocal remaining
        if call.seat == seat and remaining:
            remaining -= 1
            return Unusable("only dots")
        return team(call)

    return answer


@pytest.mark.parametrize("seat", ["planner", "solver", "critic"])
def test_unusable_reply_is_retried_with_another_variation(seat: str) -> None:
    workflow = deliberate()
    calls = drive(workflow, unusable_times(UNUSABLE_MAX - 1, seat, Team(CHAIN, answer="19")))
    tries = [call for call in calls if call.seat == seat][:UNUSABLE_MAX]
    assert [(call.variation, call.retries) for call in tries] == [(n, n) for n in range(UNUSABLE_MAX)]
    assert len({call.task for call in tries if isinstance(call.task, PlanTask)}) <= 1
    assert all(call.task == tries[0].task for call in tries)
    assert workflow.outcome == Outcome("19", confirmed=True, rounds=0)
    assert [e.output for e in workflow.transcript if e.verdict == "rejected"] == ["unusable: only dots"] * 2


@pytest.mark.parametrize("seat", ["planner", "solver", "critic"])
def test_problem_fails_after_the_last_try_and_names_the_seat(seat: str) -> None:
    workflow = deliberate()
    drive(workflow, unusable_times(UNUSABLE_MAX, seat, Team(CHAIN)))
    assert workflow.outcome is not None
    assert workflow.outcome.answer is None
    assert not workflow.outcome.confirmed
    assert workflow.outcome.failure == f"the {seat}'s reply could not be read {UNUSABLE_MAX} times: only dots"


@pytest.mark.parametrize("workflow", [Deliberate, Solo])
def test_reply_of_the_wrong_type_is_a_defect_of_the_caller(workflow: type[Workflow]) -> None:
    working = workflow(PROBLEM, workflow.Options())
    [call] = working.begin()
    with pytest.raises(TypeError, match=f"must be {call.task.reply_type.__name__}, not Solution"):
        working.take(call, Solution(result="95"))


@pytest.mark.parametrize(
    ("plan", "fault"),
    [
        (Plan(steps=(A, A)), "two steps are named A"),
        (Plan(steps=(C, A, B)), "step C needs A, B; needs must name earlier steps"),
        (
            Plan(steps=(Step(name="A", instruction="A+1", needs=("A",)),)),
            "step A needs A; needs must name earlier steps",
        ),
        (Plan(steps=(A,), answer_step="B"), "answer_step is B; it must name a step of the plan"),
    ],
)
def test_invalid_plan_is_retried(plan: Plan, fault: str) -> None:
    assert plan_fault(plan) == fault
    workflow = deliberate()
    [call] = workflow.begin()
    [again] = workflow.take(call, plan)
    assert again.task == PlanTask(PROBLEM)
    assert workflow.transcript[0].output == f"unusable: {fault}"
    assert [c.task for c in workflow.take(again, CHAIN)] == [SolveTask(PROBLEM, A)]
    assert plan_fault(PLAN) is None


def test_replies_after_a_failure_change_nothing() -> None:
    workflow = deliberate()
    [call] = workflow.begin()
    solve_a, solve_b = workflow.take(call, PLAN)
    for _ in range(UNUSABLE_MAX):
        [solve_a] = workflow.take(solve_a, Unusable("dots")) or [solve_a]
    failed, transcript = workflow.outcome, list(workflow.transcript)
    assert failed is not None
    assert failed.failure
    assert workflow.take(solve_b, Solution(result="5")) == []
    assert workflow.take(solve_b, Unusable("dots")) == []
    assert (workflow.outcome, workflow.transcript) == (failed, transcript)


# Vote


def test_vote_samples_each_step_and_judges_each_distinct_result_once() -> None:
    workflow = vote(samples=3)
    calls = drive(workflow, Team(CHAIN, {"A": ["19", "18", "19"]}, {"18": "no"}, answer="19"))
    assert solves(calls, "A") == [(SolveTask(PROBLEM, A), variation) for variation in (1, 2, 3)]
    assert [c.task for c in calls if c.seat == "critic"] == [
        CritiqueTask(PROBLEM, A, "19"),
        CritiqueTask(PROBLEM, A, "18"),
    ]
    assert calls[-1].task == AnswerTask(PROBLEM, (A,), {"A": "19"})
    assert workflow.outcome == Outcome("19", confirmed=True, rounds=0)
    solver = [(e.output, e.verdict) for e in workflow.transcript if e.seat == "solver"][:3]
    assert solver == [("19", "accepted"), ("18", "rejected"), ("19", "accepted")]


@pytest.mark.parametrize(
    ("results", "wrong", "chosen", "confirmed"),
    [
        (["18", "18", "19"], ["18"], "19", True),
        (["19", "18", "18", "19", "18"], [], "18", True),
        (["18", "18", "17"], ["17", "18"], "18", False),
    ],
    ids=["accepted beats majority", "majority of the accepted", "none accepted"],
)
def test_vote_chooses_the_majority_of_the_accepted_results(
    results: list[str], wrong: list[str], chosen: str, confirmed: bool
) -> None:
    workflow = vote(samples=len(results))
    calls = drive(workflow, Team(CHAIN, {"A": results}, dict.fromkeys(wrong, "no"), answer=chosen))
    assert calls[-1].task == AnswerTask(PROBLEM, (A,), {"A": chosen})
    assert workflow.outcome == Outcome(chosen, confirmed=confirmed, rounds=0)


def test_vote_waits_for_every_critic() -> None:
    workflow = vote(samples=1, critics=["critic", "second"])
    [plan] = workflow.begin()
    [solve] = workflow.take(plan, CHAIN)
    first, second = workflow.take(solve, Solution(result="19"))
    assert workflow.take(first, Verdict(accepted=True)) == []
    [answer] = workflow.take(second, Verdict(accepted=True))
    assert isinstance(answer.task, AnswerTask)


# Solo


def test_solo_asks_the_solver_for_the_answer() -> None:
    workflow = Solo(PROBLEM, Solo.Options())
    assert [(c.seat, c.task) for c in drive(workflow, Team())] == [("solver", AnswerTask(PROBLEM))]
    assert workflow.outcome == Outcome("95", confirmed=None, rounds=0)
    assert [(e.seat, e.input, e.output) for e in workflow.transcript] == [("solver", PROBLEM, "95")]


def test_solo_retries_unusable_replies_until_the_last_try() -> None:
    workflow = Solo(PROBLEM, Solo.Options())
    assert [call.variation for call in drive(workflow, lambda _: Unusable("dots"))] == [0, 1, 2]
    assert workflow.outcome is not None
    assert workflow.outcome.failure == "the solver's reply could not be read 3 times: dots"


# Options and seats


@pytest.mark.parametrize(
    ("workflow", "options", "seats"),
    [
        (Deliberate, {}, {"planner": (PlanTask,), "solver": (SolveTask, AnswerTask), "critic": (CritiqueTask,)}),
        (Deliberate, {"critics": []}, {"planner": (PlanTask,), "solver": (SolveTask, AnswerTask)}),
        (
            Vote,
            {"critics": ["one", "two"]},
            {
                "planner": (PlanTask,),
                "solver": (SolveTask, AnswerTask),
                "one": (CritiqueTask,),
                "two": (CritiqueTask,),
            },
        ),
        (Solo, {}, {"solver": (AnswerTask,)}),
    ],
)
def test_options_determine_the_seats(
    workflow: type[Workflow], options: dict[str, object], seats: Mapping[str, tuple[type[Task], ...]]
) -> None:
    assert workflow.seats(workflow.Options.model_validate(options)) == seats


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (Deliberate.Options, {"rounds": -1}),
        (Deliberate.Options, {"round": 1}),
        (Vote.Options, {"samples": 0}),
        (Vote.Options, {"critics": []}),
        (Solo.Options, {"rounds": 1}),
    ],
)
def test_invalid_options_are_refused(options: type[Value], wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        options.model_validate(wrong)


# Random replies


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    names = "ABCDEF"[: draw(st.integers(1, 6))]
    steps = tuple(
        Step(name=name, instruction=f"work {name}", needs=tuple(n for n in names[:index] if draw(st.booleans())))
        for index, name in enumerate(names)
    )
    return Plan(steps=steps, answer_step=draw(st.none() | st.sampled_from(names)))


@st.composite
def workflows(draw: st.DrawFn) -> tuple[Callable[[], Workflow], Plan, int]:
    """Draw a factory of a workflow, the plan to give it, and the most calls that it may make."""
    plan = draw(plans())
    critics = draw(st.integers(0, 3))
    seats = tuple(f"critic-{number}" for number in range(critics))
    if draw(st.booleans()):
        rounds = draw(st.integers(0, 3))
        options = Deliberate.Options(rounds=rounds, critics=seats)
        calls = UNUSABLE_MAX * (2 + len(plan.steps) * (rounds + 1) * (1 + critics))
        return lambda: Deliberate(PROBLEM, options), plan, calls
    samples = draw(st.integers(1, 4))
    ballot = Vote.Options(samples=samples, critics=seats or ("critic",))
    calls = UNUSABLE_MAX * (2 + len(plan.steps) * samples * (1 + (critics or 1)))
    return lambda: Vote(PROBLEM, ballot), plan, calls


def random_reply(rng: random.Random, plan: Plan, unusable: float, call: RoleCall) -> Reply | Unusable:
    if rng.random() < unusable:
        return Unusable("noise")
    match call.task:
        case PlanTask():
            return plan
        case SolveTask():
            return Solution(result=str(rng.randint(1, 3)))
        case CritiqueTask():
            return Verdict(accepted=rng.random() < 0.5, reason=rng.choice(["", "no"]))
        case _:
            return Answer(answer="done")


@settings(max_examples=200)
@given(drawn=workflows(), seed=st.integers(0, 2**32), unusable=st.sampled_from([0.0, 0.1, 0.5]))
def test_any_replies_in_any_order_end_and_replay_identically(
    drawn: tuple[Callable[[], Workflow], Plan, int], seed: int, unusable: float
) -> None:
    make, plan, calls_max = drawn
    rng = random.Random(seed)
    workflow = make()
    open_calls = list(workflow.begin())
    numbers = [call.number for call in open_calls]
    taken: list[tuple[RoleCall, Reply | Unusable, list[RoleCall]]] = []
    while open_calls:
        call = open_calls.pop(rng.randrange(len(open_calls)))
        reply = random_reply(rng, plan, unusable, call)
        assert isinstance(reply, (Unusable, type(call.task).reply_type))
        new = workflow.take(call, reply)
        taken.append((call, reply, new))
        numbers += [c.number for c in new]
        open_calls += new
        assert len(numbers) <= calls_max
        if isinstance(call.task, SolveTask):
            assert call.task.results.keys() == set(call.task.step.needs)
    assert workflow.outcome is not None
    assert (workflow.outcome.answer is None) == (workflow.outcome.failure is not None)
    assert workflow.outcome.answer or unusable
    assert len(set(numbers)) == len(numbers)

    again = make()
    again.begin()
    for call, reply, new in taken:
        assert again.take(call, reply) == new
    assert again.outcome == workflow.outcome
    assert again.transcript == workflow.transcript
