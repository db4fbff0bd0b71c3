"""The coder for chat models: a solver that writes Python programs and runs them with a tool."""

from typing import Any, ClassVar

from pydantic import Field

from agents.role import Forms, Message, Reply, Sampling, Task, Value
from agents.roles.solver import Solver
from agents.tasks import AnswerTask, DebateTask, SolveTask, Text, WriteTask

HABIT = """Use Python for whatever can be computed: write a short program that prints what you need, run it with the
tool python, and read its output before you reply. Never guess what a program would print."""
WRITE_PROMPT = """You are the coder of a team. Write what the request asks for, with the notes of your colleagues.
Reply in JSON: {"text": "...", "code": "..."}. Leave code empty if the request asks for none."""


class ProgramForm(Value):
    """The coder's reply to a request for text: the text, and a program."""

    text: str = Field(min_length=1, max_length=1600)
    code: str = Field(max_length=4000)


class Coder(Solver):
    """A solver for any chat model. It writes Python programs and runs them with the tool `python`."""

    takes = (SolveTask, AnswerTask, DebateTask, WriteTask)
    forms: ClassVar[Forms] = {**Solver.forms, WriteTask: ProgramForm}
    gives = ("code",)
    sampling = Sampling(temperature=0.2, max_tokens=2048)
    tools = ("python",)

    def messages(self, task: Task) -> list[Message]:
        if isinstance(task, WriteTask):
            notes = [f"From {name}:\n{text}" for name, text in task.results.items()]
            chat = [Message("system", WRITE_PROMPT), Message("user", "\n\n".join([f"Request: {task.problem}", *notes]))]
        else:
            chat = super().messages(task)
        system, *others = chat
        return [Message("system", f"{system.content}\n{HABIT}"), *others]

    def reply(self, form: Any, task: Task) -> Reply:
        if isinstance(form, ProgramForm):
            return Text(text=form.text, values={"code": form.code})
        return super().reply(form, task)
