"""The critic for chat models. It checks the result of one step and gives a reason for its verdict."""

from typing import Any, ClassVar

from pydantic import Field

from agents.role import Forms, Message, Reply, Sampling, SchemaRole, Task, Value
from agents.tasks import CritiqueTask, Verdict, result_lines

PROMPT = """You are the critic of a team. Check the result of one step by another way than the obvious one: the inverse
operation, an estimate, a special case. Accept it when it stands, reject it when it does not, and say why in a sentence.
Reply in JSON: {"check": "...", "accepted": true or false, "reason": "..."}"""


class VerdictForm(Value):
    """The critic's reply. `check` is first, so that the model reasons before it commits to a verdict."""

    check: str = Field(max_length=1600)
    accepted: bool
    reason: str = Field(default="", max_length=300)


class Critic(SchemaRole):
    """A critic for any chat model. It checks the result of one step with an independent method."""

    takes = (CritiqueTask,)
    forms: ClassVar[Forms] = {CritiqueTask: VerdictForm}
    sampling = Sampling(temperature=0.2, max_tokens=2048)

    def messages(self, task: Task) -> list[Message]:
        assert isinstance(task, CritiqueTask)
        lines = [
            f"Problem: {task.problem}",
            *result_lines(task.results),
            f"Step: {task.step.instruction}",
            f"Its result: {task.result}",
        ]
        return [Message("system", PROMPT), Message("user", "\n".join(lines))]

    def reply(self, form: Any, task: Task) -> Reply:
        return Verdict(accepted=form.accepted, reason=form.reason)
