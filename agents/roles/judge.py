"""The judge for chat models: it ranks whole answers."""

from typing import Any, ClassVar

from pydantic import Field

from agents.role import Forms, Message, Reply, ReplyUnusable, Sampling, SchemaRole, Task, Value
from agents.tasks import JudgeTask, Ranking

PROMPT = """You are the judge of a debate. Several candidates answer the same problem. Check each one yourself, then
rank them by their numbers, the best first. How often an answer occurs proves nothing.
Reply in JSON: {"check": "...", "order": [2, 1], "reason": "..."}"""

CANDIDATES_MAX = 100


class RankingForm(Value):
    """The judge's reply. The check comes first, so that the model reasons before it commits to an order."""

    check: str = Field(max_length=1600)
    order: list[int] = Field(min_length=1, max_length=CANDIDATES_MAX)
    reason: str = Field(max_length=300)


class Judge(SchemaRole):
    """A judge for any chat model. It ranks whole answers and says why."""

    takes = (JudgeTask,)
    forms: ClassVar[Forms] = {JudgeTask: RankingForm}
    sampling = Sampling(temperature=0.2, max_tokens=2048)

    def schema(self, task: Task) -> dict[str, Any]:
        """Return the form's schema, in which an order can only hold the numbers of the candidates."""
        assert isinstance(task, JudgeTask)
        schema = super().schema(task)
        number = {"type": "integer", "enum": list(range(1, len(task.candidates) + 1))}
        schema["properties"]["order"] |= {"items": number, "maxItems": len(task.candidates)}
        return schema

    def messages(self, task: Task) -> list[Message]:
        assert isinstance(task, JudgeTask)
        candidates = [f"Candidate {number}: {text}" for number, text in enumerate(task.candidates, start=1)]
        return [Message("system", PROMPT), Message("user", "\n".join([f"Problem: {task.problem}", *candidates]))]

    def reply(self, form: Any, task: Task) -> Reply:
        assert isinstance(task, JudgeTask)
        if unknown := sorted(set(form.order) - set(range(1, len(task.candidates) + 1))):
            raise ReplyUnusable(f"order: candidate {unknown[0]} does not exist; there are {len(task.candidates)}")
        return Ranking(order=tuple(dict.fromkeys(form.order)), reason=form.reason)
