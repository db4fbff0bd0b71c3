"""A workflow with a judge at its end, who compares the answer with the expected one."""

from agents.role import Reply
from agents.tasks import Answer, CompareTask, Verdict
from agents.workflow import Outcome, RoleCall, Unusable
from agents.workflows.judged import Judged
from agents.workflows.solo import Solo


def judged() -> Judged:
    return Judged(Solo("How long?", Solo.Options()), "judge", "85 minutes")


def test_judge_compares_the_answer_once_there_is_one() -> None:
    workflow = judged()
    [call] = workflow.begin()
    assert (call.seat, workflow.ahead()) == ("solver", {"judge": 1})
    [comparison] = workflow.take(call, Answer(answer="1 h 25 min"))
    assert (comparison.seat, workflow.ahead()) == ("judge", {})
    assert comparison.task == CompareTask("How long?", "1 h 25 min", "85 minutes")
    assert comparison.number != call.number
    assert workflow.take(comparison, Verdict(accepted=True, reason="the same time")) == []
    assert workflow.outcome == Outcome("1 h 25 min", None, 0, correct=True)
    assert [entry.seat for entry in workflow.transcript] == ["solver", "judge"]


def test_judge_is_not_asked_without_an_answer() -> None:
    workflow = judged()
    calls = workflow.begin()
    while calls:
        [call] = calls
        assert call.seat == "solver"
        calls = workflow.take(call, Unusable("dots"))
    assert workflow.outcome is not None
    assert workflow.outcome.answer is None


def test_answer_stays_if_the_judge_cannot_be_read() -> None:
    workflow = judged()
    [call] = workflow.begin()
    calls = workflow.take(call, Answer(answer="1 h 25 min"))
    tries = 0
    while calls:
        assert workflow.outcome is None
        calls = workflow.take(calls[0], Unusable("dots"))
        tries += 1
    assert (tries, workflow.outcome) == (3, Outcome("1 h 25 min", None, 0))


class Hasty(Solo):
    """A workflow that asks twice and answers with the first reply."""

    def begin(self) -> list[RoleCall]:
        return [*super().begin(), *super().begin()]

    def take(self, call: RoleCall, reply: Reply | Unusable) -> list[RoleCall]:
        return [] if self.outcome else super().take(call, reply)


def test_judge_is_asked_once_if_calls_are_open_when_the_answer_comes() -> None:
    workflow = Judged(Hasty("How long?", Solo.Options()), "judge", "85 minutes")
    first, second = workflow.begin()
    [comparison] = workflow.take(first, Answer(answer="85"))
    assert workflow.take(second, Answer(answer="65")) == []
    assert workflow.take(comparison, Verdict(accepted=True)) == []
    assert workflow.outcome == Outcome("85", None, 0, correct=True)
