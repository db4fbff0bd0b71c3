"""The embedded team's roles. They speak the notation that the shipped models were trained on."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import ClassVar

from agents.arithmetic import scratchpad, wording
from agents.arithmetic.expressions import DIGITS, OutOfBounds, read, read_operation
from agents.role import Message, Reply, ReplyUnusable, Role, Sampling, Task, TaskRefused
from agents.tasks import (
    Answer,
    AnswerTask,
    Argument,
    CritiqueTask,
    DebateTask,
    Plan,
    PlanTask,
    Solution,
    SolveTask,
    Step,
    Verdict,
)

PROBLEM_MAX_CHARACTERS = 400
_ALPHABET = re.compile(r"[a-z0-9+\-*().,?!= ]*")
_ASKING = re.compile(r"(?:what is|compute|calculate|work out)?\s*([0-9(].*?)\s*=?\s*[?.]?")
_SAME_SIGN = str.maketrans({"×": "*", "·": "*", "−": "-", "–": "-"})


class ArithmeticRole(Role):
    """The base of the three roles: one user message, greedy sampling by default, a reply in plain text."""

    sampling: ClassVar[Sampling] = Sampling(temperature=0.0, max_tokens=48, retry_temperature=1.0)

    def messages(self, task: Task) -> list[Message]:
        try:
            return [Message("user", self.prompt(task))]
        except OutOfBounds as error:
            raise TaskRefused(str(error)) from None

    def parse(self, text: str, task: Task) -> Reply:
        try:
            return self.read(text.strip(), task)
        except ValueError as error:
            raise ReplyUnusable(str(error)) from None

    def check(self, problem: str) -> None:
        try:
            as_read(problem)
        except OutOfBounds as error:
            raise TaskRefused(str(error)) from None

    def prompt(self, task: Task) -> str:
        """Return the prompt for the task. Raise OutOfBounds."""
        raise NotImplementedError

    def read(self, text: str, task: Task) -> Reply:
        """Return the reply in the model's text. Raise ValueError."""
        raise NotImplementedError


class ArithmeticPlanner(ArithmeticRole):
    """The embedded planner. It splits an expression or a word problem into steps of two operands."""

    takes = (PlanTask,)

    def prompt(self, task: Task) -> str:
        assert isinstance(task, PlanTask)
        return scratchpad.plan_prompt(as_read(task.problem))

    def read(self, text: str, task: Task) -> Reply:
        assert isinstance(task, PlanTask)
        operations = scratchpad.read_plan(text, as_read(task.problem))
        return Plan(
            steps=tuple(
                Step(name=o.name, instruction=str(o), needs=tuple(x for x in (o.left, o.right) if x.isalpha()))
                for o in operations
            ),
            answer_step=operations[-1].name,
        )


class ArithmeticSolver(ArithmeticRole):
    """The embedded solver. It solves one step digit by digit in a scratchpad.

    In a debate it answers again, without regard to the others: its model was not trained to read their answers.
    """

    takes = (SolveTask, AnswerTask, DebateTask)

    def prompt(self, task: Task) -> str:
        if isinstance(task, AnswerTask | DebateTask):
            return scratchpad.at_once_prompt(as_read(task.problem))
        assert isinstance(task, SolveTask)
        return scratchpad.step_prompt(*worked_out(task.step, task.results))

    def read(self, text: str, task: Task) -> Reply:
        if isinstance(task, AnswerTask | DebateTask):
            answer = str(scratchpad.read_at_once(text))
            return Answer(answer=answer) if isinstance(task, AnswerTask) else Argument(answer=answer, reasoning=text)
        return Solution(result=str(scratchpad.read_result(text)), work=text)


class ArithmeticCritic(ArithmeticRole):
    """The embedded critic. It checks sums by the inverse operation, and products by casting out nines and elevens."""

    takes = (CritiqueTask,)

    def prompt(self, task: Task) -> str:
        assert isinstance(task, CritiqueTask)
        return scratchpad.claim_prompt(*worked_out(task.step, task.results), claimed(task.result))

    def read(self, text: str, task: Task) -> Reply:
        accepted = scratchpad.read_verdict(text)
        return Verdict(accepted=accepted, reason="" if accepted else "the inverse operation does not give it back")


@lru_cache(maxsize=1024)  # the check of every seat and the planner read the same problem
def as_read(problem: str) -> str:
    """Return the problem as the planner was trained to read it: an expression or a known wording.

    Raise OutOfBounds if the problem is neither or exceeds a bound.
    """
    if len(problem) > PROBLEM_MAX_CHARACTERS:
        raise OutOfBounds(
            f"the problem has {len(problem)} characters; the embedded team reads at most {PROBLEM_MAX_CHARACTERS}"
        )
    text = wording.tidy(problem.translate(_SAME_SIGN))
    if not text:
        raise OutOfBounds("the problem is empty: write an expression such as (12+7)*3, or a word problem")
    known = _ALPHABET.match(text)
    assert known is not None
    if known.end() < len(text):
        raise OutOfBounds(
            f"character {text[known.end()]!r} is outside the embedded team's alphabet: "
            "letters, digits, + - * ( ) . , ? ! ="
        )
    asked = _ASKING.fullmatch(text)
    if asked and not re.search("[a-z]", asked[1]):
        return read(asked[1]).text
    if not re.search("[a-z]", text):
        return read(text).text
    read(wording.recognise(text))
    return text


def worked_out(step: Step, results: Mapping[str, str]) -> tuple[int, str, int]:
    """Return a step's left operand, operator and right operand, with results in place of names. Raise OutOfBounds."""
    return read_operation(re.sub(r"[A-F]", lambda match: results.get(match[0], match[0]), step.instruction))


def claimed(result: str) -> int:
    """Return the claimed result of a step as a number. Raise OutOfBounds."""
    if not re.fullmatch(rf"-?[0-9]{{1,{DIGITS}}}", result):
        raise OutOfBounds(f"result {result[:40]!r} is not a whole number of at most {DIGITS} digits")
    return int(result)
