"""Adds a judge to a workflow: the judge compares the answer with the expected answer."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from agents.role import Reply, Task, Value
from agents.tasks import CompareTask, Verdict
from agents.workflow import RoleCall, Unusable, Workflow, wrong_type


class Judged(Workflow):
    """A workflow that runs another workflow and then asks a judge to compare the answer with the expected answer.

    `correct` of the outcome is the judge's verdict. It is None if there is no answer, or if the judge's replies are
    unusable. The judge reads the problem and the two answers only. The other seats never read the expected answer.
    """

    def __init__(self, inner: Workflow, judge: str, expected: str) -> None:
        super().__init__(inner.problem, inner.options)
        self.transcript = inner.transcript
        self._inner = inner
        self._judge = judge
        self._expected = expected
        self._comparison: int | None = None  # the number of the judge's open call

    @classmethod
    def seats(cls, options: Value) -> Mapping[str, tuple[type[Task], ...]]:
        """Raise TypeError. The seats depend on the inner workflow, which a class method does not know."""
        raise TypeError("Judged has no seats without the workflow that it wraps")

    def begin(self) -> list[RoleCall]:
        return self._following(self._inner.begin())

    def take(self, call: RoleCall, reply: Reply | Unusable) -> list[RoleCall]:
        if call.number != self._comparison:
            return self._following(self._inner.take(call, reply))
        assert self._inner.outcome is not None
        if isinstance(reply, Unusable):
            again = self._inner.retry(call, reply)
            self._comparison = again[0].number if again else None
            self.outcome = None if again else self._inner.outcome
            return again
        if not isinstance(reply, Verdict):
            raise wrong_type(call.task, reply)
        self.record(call, reply)
        self.outcome = replace(self._inner.outcome, correct=reply.accepted)
        return []

    def ahead(self) -> Mapping[str, int] | None:
        if self._inner.outcome is not None:
            return {}
        inner = self._inner.ahead()
        return None if inner is None else Counter(inner) + Counter([self._judge])

    def _following(self, calls: list[RoleCall]) -> list[RoleCall]:
        """Return the next calls: those of the inner workflow, or the judge's call when there is an answer."""
        outcome = self._inner.outcome
        if outcome is None:
            return calls
        if self._comparison is not None:
            return []  # the reply belongs to a call that was open when the inner workflow ended
        if outcome.answer is None:
            self.outcome = outcome
            return []
        comparison = self._inner.ask(self._judge, CompareTask(self.problem, outcome.answer, self._expected))
        self._comparison = comparison.number
        return [comparison]
