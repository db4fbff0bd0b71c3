"""The planner for chat models: it splits a problem into a few steps in plain language."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from agents.role import Forms, Message, Plan, PlanTask, Reply, Sampling, SchemaRole, Step, Task, Value

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
    sampling = Sampling(temperature=0.2, max_tokens=8192)

    def messages(self, task: Task) -> list[Message]:
        return [Message("system", PROMPT), Message("user", str(task))]

    def reply(self, form: Any, task: Task) -> Reply:
        return numbered_plan(form.steps)


def numbered_plan(instructions: Sequence[str]) -> Plan:
    """Return a plan with steps named 1, 2, 3 and so on. Each step needs all steps before it."""
    names = [str(number) for number in range(1, len(instructions) + 1)]
    return Plan(
        steps=tuple(
            Step(name=name, instruction=instruction, needs=tuple(names[:index]))
            for index, (name, instruction) in enumerate(zip(names, instructions, strict=True))
        )
    )
