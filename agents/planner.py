"""The planner for instruct models: a problem becomes a few steps in plain language."""

from typing import Annotated, Any, ClassVar

from pydantic import Field

from agents.role import Forms, Message, Plan, PlanTask, Reply, Sampling, SchemaRole, Step, Task, Value

PROMPT = """You are the planner of a team. Split the problem into the fewest ordered steps that lead to its answer.
Each step is one instruction that a colleague can carry out with the results of the steps before it. Do not solve
anything yourself. Reply in JSON: {"steps": ["...", "..."]}"""

STEPS_MAX = 10


class PlanForm(Value):
    """The steps, each an instruction."""

    steps: list[Annotated[str, Field(min_length=1, max_length=160)]] = Field(min_length=1, max_length=STEPS_MAX)


class Planner(SchemaRole):
    """Splits a problem into ordered steps for instruct models."""

    takes = (PlanTask,)
    forms: ClassVar[Forms] = {PlanTask: PlanForm}
    sampling = Sampling(temperature=0.2, max_tokens=8192)

    def messages(self, task: Task) -> list[Message]:
        return [Message("system", PROMPT), Message("user", str(task))]

    def reply(self, form: Any, task: Task) -> Reply:
        names = [str(number) for number in range(1, len(form.steps) + 1)]
        return Plan(
            steps=tuple(
                Step(name=name, instruction=text, needs=tuple(names[:index]))
                for index, (name, text) in enumerate(zip(names, form.steps, strict=True))
            )
        )
