"""The solver for chat models. It solves one step of a plan, states the answer, or takes part in a debate."""

from typing import Any, ClassVar

from pydantic import Field

from agents.role import Forms, Message, Reply, Sampling, SchemaRole, Task, Value
from agents.tasks import Answer, AnswerTask, Argument, DebateTask, Solution, SolveTask, result_lines

STEP_PROMPT = """You are the solver of a team. Carry out the one step you are given, with the results so far. Show your
work briefly, then give the step's result alone. Reply in JSON: {"work": "...", "result": "..."}"""
ANSWER_PROMPT = """You are the solver of a team. Give the final answer to the problem, from the results of the steps
where there are any: the answer alone, without explanation. Reply in JSON: {"answer": "..."}"""
DEBATE_PROMPT = """You are one of several solvers who debate a problem. Work it out briefly, then give the answer alone.
If you see the answers of others, look for mistakes in theirs and in yours before you decide.
Reply in JSON: {"reasoning": "...", "answer": "..."}"""


class SolutionForm(Value):
    """The solver's reply to a step. `work` is first, so that the model reasons before it commits to a result."""

    work: str = Field(max_length=1600)
    result: str = Field(min_length=1, max_length=400)


class AnswerForm(Value):
    """The solver's reply to a request for the answer."""

    answer: str = Field(min_length=1, max_length=400)


class ArgumentForm(Value):
    """The solver's reply in a debate. `reasoning` is first, so that the model reasons before it answers."""

    reasoning: str = Field(max_length=1600)
    answer: str = Field(min_length=1, max_length=400)


class Solver(SchemaRole):
    """A solver for any chat model. It solves one step of a plan, states the answer, or debates."""

    takes: ClassVar[tuple[type[Task], ...]] = (SolveTask, AnswerTask, DebateTask)
    forms: ClassVar[Forms] = {SolveTask: SolutionForm, AnswerTask: AnswerForm, DebateTask: ArgumentForm}
    sampling = Sampling(temperature=0.2, max_tokens=2048)

    def messages(self, task: Task) -> list[Message]:
        match task:
            case SolveTask():
                lines = [*result_lines(task.results), f"Your step: {task.step.instruction}"]
                if task.feedback:
                    lines.append(f"Your last result was rejected: {task.feedback}. Work it again, another way.")
                prompt = STEP_PROMPT
            case DebateTask():
                lines = [f"Your last answer: {task.own}"] if task.own else []
                lines += [f"Another solver's answer: {other}" for other in task.others]
                prompt = DEBATE_PROMPT
            case AnswerTask():
                lines, prompt = result_lines(task.results, task.steps), ANSWER_PROMPT
            case _:
                raise TypeError(f"{type(self).__name__} does not take {type(task).__name__}")
        return [Message("system", prompt), Message("user", "\n".join([f"Problem: {task.problem}", *lines]))]

    def reply(self, form: Any, task: Task) -> Reply:
        match form:
            case SolutionForm():
                return Solution(result=form.result, work=form.work)
            case ArgumentForm():
                return Argument(answer=form.answer, reasoning=form.reasoning)
            case _:
                return Answer(answer=form.answer)
