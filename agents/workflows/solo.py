"""The workflow `solo`."""

from collections.abc import Mapping

from agents.role import Reply, Task, Value
from agents.tasks import Answer, AnswerTask
from agents.workflow import Outcome, RoleCall, Unusable, Workflow, wrong_type


class Solo(Workflow):
    """A single call: the solver answers without a plan or a critic. Solo is the baseline for teams."""

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
            raise wrong_type(call.task, reply)
        self.record(call, reply)
        self.outcome = Outcome(reply.answer, None, 0)
        return []
