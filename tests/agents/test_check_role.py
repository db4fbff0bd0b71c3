"""Roles held against their contract: good ones pass, each kind of fault is told."""

import itertools
import json
from collections.abc import Callable
from typing import Any, get_args

import pytest

from agents.check_role import RUBBISH, SAMPLES, check_role
from agents.registry import registered
from agents.role import (
    TASKS,
    Answer,
    AnswerTask,
    Message,
    PlanTask,
    Reply,
    ReplyUnusable,
    Role,
    Sampling,
    SolveTask,
    Task,
    TaskRefused,
    Verdict,
)


class Free(Role):
    """A role in free text, without fault."""

    takes = (AnswerTask,)

    def messages(self, task: Task) -> list[Message]:
        return [Message("user", task.problem)]

    def parse(self, text: str, task: Task) -> Reply:
        if not text:
            raise ReplyUnusable("nothing")
        return Answer(answer=text)


def shaped(**members: Any) -> Role:
    """The faultless role with some members replaced."""
    role: Role = type("Shaped", (Free,), members)()
    return role


def test_every_kind_of_task_has_samples() -> None:
    assert SAMPLES.keys() == TASKS.keys()
    assert all(isinstance(task, TASKS[kind]) for kind, tasks in SAMPLES.items() for task in tasks)


@pytest.mark.parametrize(
    "entry", [e for e in registered("role") if e.origin.startswith("troupe-llm ")], ids=lambda e: e.name
)
def test_the_built_in_roles_keep_the_contract(entry: Any) -> None:
    assert check_role(entry.load_role()()) == []


def test_a_role_in_free_text_keeps_the_contract() -> None:
    assert check_role(Free()) == []


def raising(error: Exception) -> Callable[..., Any]:
    def raise_it(*_: object) -> Any:
        raise error

    return raise_it


OBJECT = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no takes": ({"takes": ()}, "takes is ()"),
    "takes is no tuple": ({"takes": AnswerTask}, "has to be a tuple of one or more of PlanTask"),
    "takes something else": ({"takes": (AnswerTask, "solve")}, "takes holds 'solve'"),
    "sampling is a dict": ({"sampling": {"temperature": 0}}, "sampling is {'temperature': 0}"),
    "check raises": ({"check": raising(KeyError("x"))}, "answer: KeyError: 'x' for 12+7"),
    "messages raises": ({"messages": raising(KeyError("x"))}, "refuses with TaskRefused"),
    "messages is empty": ({"messages": lambda *_: []}, "messages() gave []"),
    "messages are dicts": ({"messages": lambda *_: [{"role": "user"}]}, "has to be a list of one or more"),
    "messages is one": ({"messages": lambda *_: Message("user", "x")}, "has to be a list of one or more"),
    "an unknown speaker": ({"messages": lambda _, task: [Message("tool", task.problem)]}, "role is 'tool'"),  # type: ignore[arg-type]  # the fault
    "an empty message": ({"messages": lambda *_: [Message("user", " ")]}, "it has to be text"),
    "the same for all": ({"messages": lambda *_: [Message("user", "go")]}, "says the same for every task"),
    "refuses all": ({"messages": raising(TaskRefused("not mine"))}, "refuses all 3 samples, the last for: not mine"),
    "check refuses all": ({"check": raising(TaskRefused("not mine"))}, "refuses all 3 samples, the last for: not mine"),
    "schema raises": ({"schema": raising(KeyError("x"))}, "schema() raised KeyError: 'x'"),
    "schema is a list": ({"schema": lambda *_: []}, "schema() gave []"),
    "schema is wrong": ({"schema": lambda *_: {"type": "objekt"}}, "no valid JSON schema"),
    "schema is no JSON": ({"schema": lambda *_: {"default": {1}}}, "schema() raised TypeError"),
    "parse raises on rubbish": ({"parse": raising(ValueError("bad"))}, "parse('') raised ValueError: bad"),
    "parse gives another type": ({"parse": lambda *_: Verdict(accepted=True)}, "the reply to a AnswerTask is a Answer"),
    "parse reads an empty reply": ({"parse": lambda *_: Answer(answer="x")}, "parse('') gave"),
    "parse reads rubbish in spite of a schema": ({"schema": lambda *_: OBJECT}, "parse('}{') gave"),
}


@pytest.mark.parametrize(("members", "told"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_told(members: dict[str, Any], told: str) -> None:
    assert any(told in fault for fault in check_role(shaped(**members))), check_role(shaped(**members))


def test_a_role_that_counts_its_calls_is_told() -> None:
    numbers = itertools.count()
    role = shaped(messages=lambda _, task: [Message("user", f"{next(numbers)} {task.problem}")])
    assert any("the same task has to give the same messages" in fault for fault in check_role(role))


def test_a_role_that_misreads_what_its_own_schema_allows_is_told() -> None:
    def parse(self: Role, text: str, task: Task) -> Reply:
        if text in RUBBISH:
            raise ReplyUnusable("rubbish")
        return Answer(answer=json.loads(text)["anser"])

    [fault] = check_role(shaped(schema=lambda *_: OBJECT, parse=parse))
    assert fault.startswith("""answer: parse('{"answer": "1"}') raised KeyError: 'anser'""")


def test_a_verdict_is_never_seen_in_rubbish() -> None:
    class Yes(Role):
        takes = (TASKS["critique"],)

        def messages(self, task: Task) -> list[Message]:
            return [Message("user", str(task))]

        def parse(self, text: str, task: Task) -> Reply:
            if not text:
                raise ReplyUnusable("nothing")
            return Verdict(accepted="wrong" not in text)

    assert any("parse('}{') gave" in fault for fault in check_role(Yes()))


def test_a_role_may_refuse_some_tasks() -> None:
    def check(self: Role, problem: str) -> None:
        if "train" in problem:
            raise TaskRefused("trains")

    assert check_role(shaped(check=check)) == []


def test_the_samples_can_be_one_s_own() -> None:
    def messages(self: Role, task: Task) -> list[Message]:
        if "SELECT" not in task.problem:
            raise TaskRefused("only SQL")
        return [Message("user", task.problem)]

    assert check_role(shaped(messages=messages)) != []
    assert check_role(shaped(messages=messages), {"answer": [AnswerTask("SELECT 1"), AnswerTask("SELECT 2")]}) == []


def test_the_samples_hold_what_a_role_might_stumble_over() -> None:
    solve = [task for task in SAMPLES["solve"] if isinstance(task, SolveTask)]
    assert any(task.feedback for task in solve)
    assert any(task.results for task in solve)
    assert PlanTask in get_args(Task)
    assert Sampling() == Free.sampling
