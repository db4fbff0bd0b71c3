"""The planner for chat models. It splits a problem into a few steps in plain language."""

from typing import Annotated, Any, ClassVar

from pydantic import Field

from agents.role import Forms, Message, Reply, Sampling, SchemaRole, Task, Value
from agents.tasks import Plan, PlanTask

PROMPT = """You are the planner of a team. Split the problem into the fewest ordered steps that lead to its answer.
Each step is one instruction that a colleague can carry out with the results of the steps before it. Do not solve
anything yourself. Reply in JSON: {"steps": ["...", "..."]}"""

STEPS_MAX = 10


class PlanForm(Value):
    """The planner's reply: one instruction for each step."""

    steps: list[Annotated[str, Field(min_length=1, max_length=160)]] = Field(min_length=1, max_length=STEPS_MAX)


class Planner(SchemaRole):
    """A planner for any chat model. It splits a problem into ordered steps."""

    takes = (PlanTask,)
    forms: ClassVar[Forms] = {PlanTask: PlanForm}
    sampling = Sampling(temperature=0.2, max_tokens=2048)

    def messages(self, task: Task) -> list[Message]:
        return [Message("system", PROMPT), Message("user", str(task))]

    def reply(self, form: Any, task: Task) -> Reply:
        return Plan.in_order(form.steps)
