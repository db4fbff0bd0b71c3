"""Another workflow, with a judge at its end that compares the answer with the expected one."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from agents.role import Reply, Task, Value
from agents.tasks import CompareTask, Verdict
from agents.workflow import RoleCall, Unusable, Workflow


class Judged(Workflow):
    """Another workflow, with a judge at its end that compares the answer with the expected one.

    The verdict is the outcome's `correct`. It stays None if there is no answer, or if the judge's replies cannot be
    read. The judge never sees the problem's work, and the other seats never see the expected answer.
    """

    def __init__(self, inner: Workflow, judge: str, expected: str) -> None:
        super().__init__(inner.problem, inner.options)
        self.transcript = inner.transcript
        self._inner = inner
        self._judge = judge
        self._expected = expected

    @classmethod
    def seats(cls, options: Value) -> Mapping[str, tuple[type[Task], ...]]:
        """Raise TypeError: the seats are those of the other workflow, and the judge's."""
        raise TypeError("Judged is made from a workflow and has no options of its own")

    def begin(self) -> list[RoleCall]:
        return self._following(self._inner.begin())

    def take(self, call: RoleCall, reply: Reply | Unusable) -> list[RoleCall]:
        if not isinstance(call.task, CompareTask):
            return self._following(self._inner.take(call, reply))
        assert self._inner.outcome is not None
        if isinstance(reply, Unusable):
            again = self._inner.retry(call, reply)
            self.outcome = None if again else self._inner.outcome
            return again
        assert isinstance(reply, Verdict)
        self.record(call, reply)
        self.outcome = replace(self._inner.outcome, correct=reply.accepted)
        return []

    def ahead(self) -> Mapping[str, int] | None:
        if self._inner.outcome is not None:
            return {}
        inner = self._inner.ahead()
        return None if inner is None else Counter(inner) + Counter([self._judge])

    def _following(self, calls: list[RoleCall]) -> list[RoleCall]:
        """Return the other workflow's next calls, or the judge's once there is an answer."""
        outcome = self._inner.outcome
        if outcome is None:
            return calls
        if outcome.answer is None:
            self.outcome = outcome
            return []
        return [self._inner.ask(self._judge, CompareTask(self.problem, outcome.answer, self._expected))]
