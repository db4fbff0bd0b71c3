"""The critic for instruct models: checks one result, and says why it does not stand."""

from typing import Any, ClassVar

from pydantic import Field

from agents.role import CritiqueTask, Forms, Message, Reply, Sampling, SchemaRole, Task, Value, Verdict
from agents.solver import results_so_far

PROMPT = """You are the critic of a team. Check the result of one step by another way than the obvious one: the inverse
operation, an estimate, a special case. Accept it when it stands, reject it when it does not, and say why in a sentence.
Reply in JSON: {"check": "...", "accepted": true or false, "reason": "..."}"""


class VerdictForm(Value):
    """The check before the verdict, so that the model thinks before it commits."""

    check: str = Field(max_length=1600)
    accepted: bool
    reason: str = Field(max_length=300)


class Critic(SchemaRole):
    """Checks the result of one step by another way, for instruct models."""

    takes = (CritiqueTask,)
    forms: ClassVar[Forms] = {CritiqueTask: VerdictForm}
    sampling = Sampling(temperature=0.2, max_tokens=8192)

    def messages(self, task: Task) -> list[Message]:
        assert isinstance(task, CritiqueTask)
        lines = [
            f"Problem: {task.problem}",
            *results_so_far(task.results),
            f"Step: {task.step.instruction}",
            f"Its result: {task.result}",
        ]
        return [Message("system", PROMPT), Message("user", "\n".join(lines))]

    def reply(self, form: Any, task: Task) -> Reply:
        return Verdict(accepted=form.accepted, reason=form.reason)
