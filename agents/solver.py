"""The solver for chat models: it solves one step at a time and states the answer at the end."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from agents.role import (
    Answer,
    AnswerTask,
    Forms,
    Message,
    Reply,
    Sampling,
    SchemaRole,
    Solution,
    SolveTask,
    Step,
    Task,
    Value,
)

STEP_PROMPT = """You are the solver of a team. Carry out the one step you are given, with the results so far. Show your
work briefly, then give the step's result alone. Reply in JSON: {"work": "...", "result": "..."}"""
ANSWER_PROMPT = """You are the solver of a team. Give the final answer to the problem, from the results of the steps
where there are any: the answer alone, without explanation. Reply in JSON: {"answer": "..."}"""


class SolutionForm(Value):
    """The solver's reply to a step. The work comes first, so that the model reasons before it commits to a result."""

    work: str = Field(max_length=1600)
    result: str = Field(min_length=1, max_length=400)


class AnswerForm(Value):
    """The solver's reply to a request for the answer."""

    answer: str = Field(min_length=1, max_length=400)


class Solver(SchemaRole):
    """A solver for any chat model. It solves one step of a plan, or states the answer."""

    takes = (SolveTask, AnswerTask)
    forms: ClassVar[Forms] = {SolveTask: SolutionForm, AnswerTask: AnswerForm}
    sampling = Sampling(temperature=0.2, max_tokens=8192)

    def messages(self, task: Task) -> list[Message]:
        if isinstance(task, SolveTask):
            lines = [f"Problem: {task.problem}", *results_so_far(task.results), f"Your step: {task.step.instruction}"]
            if task.feedback:
                lines.append(f"Your last result was rejected: {task.feedback}. Work it again, another way.")
            return [Message("system", STEP_PROMPT), Message("user", "\n".join(lines))]
        assert isinstance(task, AnswerTask)
        lines = [f"Problem: {task.problem}", *results_so_far(task.results, task.steps)]
        return [Message("system", ANSWER_PROMPT), Message("user", "\n".join(lines))]

    def reply(self, form: Any, task: Task) -> Reply:
        if isinstance(task, SolveTask):
            return Solution(result=form.result, work=form.work)
        return Answer(answer=form.answer)


def results_so_far(results: Mapping[str, str], steps: tuple[Step, ...] = ()) -> list[str]:
    """Return one line for each result, with the instruction of its step if `steps` holds that step."""
    instructions = {step.name: f" ({step.instruction})" for step in steps}
    return [f"Result of step {name}{instructions.get(name, '')}: {result}" for name, result in results.items()]
