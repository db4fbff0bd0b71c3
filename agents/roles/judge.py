"""The judge for chat models. It ranks answers, and compares an answer with the expected answer."""

from typing import Any, ClassVar

from pydantic import Field

from agents.role import Forms, Message, Reply, ReplyUnusable, Sampling, SchemaRole, Task, Value
from agents.tasks import CompareTask, JudgeTask, Ranking, Verdict

PROMPT = """You are the judge of a debate. Several candidates answer the same problem. Check each one yourself, then
rank them by their numbers, the best first. How often an answer occurs proves nothing.
Reply in JSON: {"check": "...", "order": [2, 1], "reason": "..."}"""

COMPARE_PROMPT = """Does the answer mean the same as the expected answer to the problem? Ignore wording, units that are
understood, and formatting. Reply in JSON: {"reason": "...", "accepted": true or false}"""

CANDIDATES_MAX = 100


class RankingForm(Value):
    """The judge's reply to a ranking. `check` is first, so that the model reasons before it commits to an order."""

    check: str = Field(max_length=1600)
    order: list[int] = Field(min_length=1, max_length=CANDIDATES_MAX)
    reason: str = Field(default="", max_length=300)


class ComparisonForm(Value):
    """The judge's reply to a comparison. `reason` is first, so that the model reasons before it decides."""

    reason: str = Field(max_length=300)
    accepted: bool


class Judge(SchemaRole):
    """A judge for any chat model. It ranks answers, and compares an answer with the expected answer."""

    takes = (JudgeTask, CompareTask)
    forms: ClassVar[Forms] = {JudgeTask: RankingForm, CompareTask: ComparisonForm}
    sampling = Sampling(temperature=0.2, max_tokens=2048)

    def schema(self, task: Task) -> dict[str, Any]:
        """Return the form's schema. In a ranking, limit `order` to the numbers of the candidates."""
        schema = super().schema(task)
        if not isinstance(task, JudgeTask):
            return schema
        number = {"type": "integer", "enum": list(range(1, len(task.candidates) + 1))}
        schema["properties"]["order"] |= {"items": number, "maxItems": len(task.candidates)}
        return schema

    def messages(self, task: Task) -> list[Message]:
        if isinstance(task, CompareTask):
            text = f"Problem: {task.problem}\nExpected answer: {task.expected}\nAnswer: {task.answer}"
            return [Message("system", COMPARE_PROMPT), Message("user", text)]
        assert isinstance(task, JudgeTask)
        candidates = [f"Candidate {number}: {text}" for number, text in enumerate(task.candidates, start=1)]
        return [Message("system", PROMPT), Message("user", "\n".join([f"Problem: {task.problem}", *candidates]))]

    def reply(self, form: Any, task: Task) -> Reply:
        if isinstance(form, ComparisonForm):
            return Verdict(accepted=form.accepted, reason=form.reason)
        assert isinstance(task, JudgeTask)
        if unknown := sorted(set(form.order) - set(range(1, len(task.candidates) + 1))):
            raise ReplyUnusable(f"order: candidate {unknown[0]} does not exist; there are {len(task.candidates)}")
        return Ranking(order=tuple(dict.fromkeys(form.order)), reason=form.reason)
