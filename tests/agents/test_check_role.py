"""The check of roles: sound roles pass, and every kind of fault is reported."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from agents.check_role import RUBBISH, check_role, task_faults
from agents.registry import registered
from agents.role import Message, Reply, ReplyUnusable, Role, Task, TaskRefused
from agents.tasks import Answer, AnswerTask, CritiqueTask, SolveTask, Verdict


class Free(Role):
    """A sound role that replies in free text."""

    takes = (AnswerTask,)

    def messages(self, task: Task) -> list[Message]:
        return [Message("user", task.problem)]

    def parse(self, text: str, task: Task) -> Reply:
        if not text:
            raise ReplyUnusable("nothing")
        return Answer(answer=text)


def shaped(**members: Any) -> Role:
    """Return the sound role with some members replaced."""
    role: Role = type("Shaped", (Free,), members)()
    return role


@pytest.mark.parametrize("entry", registered("task"), ids=lambda e: e.name)
def test_every_kind_of_task_has_examples(entry: Any) -> None:
    task = entry.load_task()
    assert len(task.examples()) > 1
    assert all(type(example) is task for example in task.examples())
    assert all(set(example.texts()) == set(task.placeholders()) for example in task.examples())


@pytest.mark.parametrize(
    "entry", [e for e in registered("role") if e.origin.startswith("troupe-llm ")], ids=lambda e: e.name
)
def test_built_in_role_keeps_its_contract(entry: Any) -> None:
    assert check_role(entry.load_role()()) == []


def test_free_text_role_keeps_its_contract() -> None:
    assert check_role(Free()) == []


def raising(error: Exception) -> Callable[..., Any]:
    def raise_it(*_: object) -> Any:
        raise error

    return raise_it


OBJECT = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no takes": ({"takes": ()}, "takes is ()"),
    "takes is a class": ({"takes": AnswerTask}, "must be a tuple of one or more kinds of task"),
    "takes contains a string": (
        {"takes": (AnswerTask, "solve")},
        "'solve' is not a kind of task: it must be a subclass of agents.Task",
    ),
    "sampling is a dict": ({"sampling": {"temperature": 0}}, "sampling is {'temperature': 0}"),
    "check raises": ({"check": raising(KeyError("x"))}, "answer: KeyError: 'x' for 12+7"),
    "messages raises": ({"messages": raising(KeyError("x"))}, "to refuse a task, raise TaskRefused"),
    "messages is empty": ({"messages": lambda *_: []}, "messages() returned []"),
    "messages are dicts": ({"messages": lambda *_: [{"role": "user"}]}, "must be a list of one or more"),
    "messages is not a list": ({"messages": lambda *_: Message("user", "x")}, "must be a list of one or more"),
    "unknown speaker": ({"messages": lambda _, task: [Message("tool", task.problem)]}, "role is 'tool'"),  # type: ignore[arg-type]  # the fault
    "empty message": ({"messages": lambda *_: [Message("user", " ")]}, "it must be text"),
    "same messages for all": ({"messages": lambda *_: [Message("user", "go")]}, "the same messages for every task"),
    "messages refuses all": ({"messages": raising(TaskRefused("not mine"))}, "refuses all 3 samples; last: not mine"),
    "check refuses all": ({"check": raising(TaskRefused("not mine"))}, "refuses all 3 samples; last: not mine"),
    "schema raises": ({"schema": raising(KeyError("x"))}, "schema() raised KeyError: 'x'"),
    "schema is a list": ({"schema": lambda *_: []}, "schema() returned []"),
    "schema is invalid": ({"schema": lambda *_: {"type": "objekt"}}, "an invalid JSON schema"),
    "schema is not JSON": ({"schema": lambda *_: {"default": {1}}}, "schema() raised TypeError"),
    "parse raises on rubbish": ({"parse": raising(ValueError("bad"))}, "parse('') raised ValueError: bad"),
    "max_tokens raises": ({"max_tokens": raising(KeyError("x"))}, "max_tokens() raised KeyError: 'x'"),
    "max_tokens is None": ({"max_tokens": lambda *_: None}, "max_tokens() returned None"),
    "needs is text": ({"needs": "facts"}, "needs is 'facts': it must be a tuple of names"),
    "parse returns another type": (
        {"parse": lambda *_: Verdict(accepted=True)},
        "the reply to AnswerTask must be Answer",
    ),
    "parse accepts an empty reply": ({"parse": lambda *_: Answer(answer="x")}, "parse('') returned"),
    "parse accepts rubbish despite a schema": ({"schema": lambda *_: OBJECT}, "parse('}{') returned"),
}


@pytest.mark.parametrize(("members", "message"), FAULTS.values(), ids=FAULTS)
def test_fault_is_reported(members: dict[str, Any], message: str) -> None:
    faults = check_role(shaped(**members))
    assert any(message in fault for fault in faults), faults


def test_messages_that_differ_between_calls_are_reported() -> None:
    numbers = itertools.count()
    role = shaped(messages=lambda _, task: [Message("user", f"{next(numbers)} {task.problem}")])
    assert any("the same task must give the same messages" in fault for fault in check_role(role))


def test_parse_that_fails_on_a_reply_of_the_schema_is_reported() -> None:
    def parse(self: Role, text: str, task: Task) -> Reply:
        if text in RUBBISH:
            raise ReplyUnusable("rubbish")
        return Answer(answer=json.loads(text)["anser"])

    [fault] = check_role(shaped(schema=lambda *_: OBJECT, parse=parse))
    assert fault.startswith("""answer: parse('{"answer": "1"}') raised KeyError: 'anser'""")


def test_verdict_read_from_rubbish_is_reported() -> None:
    class Yes(Role):
        takes = (CritiqueTask,)

        def messages(self, task: Task) -> list[Message]:
            return [Message("user", str(task))]

        def parse(self, text: str, task: Task) -> Reply:
            if not text:
                raise ReplyUnusable("nothing")
            return Verdict(accepted="wrong" not in text)

    assert any("parse('}{') returned" in fault for fault in check_role(Yes()))


def test_role_may_refuse_some_tasks() -> None:
    def check(self: Role, problem: str) -> None:
        if "train" in problem:
            raise TaskRefused("trains")

    assert check_role(shaped(check=check)) == []


def test_samples_can_be_given() -> None:
    def messages(self: Role, task: Task) -> list[Message]:
        if "SELECT" not in task.problem:
            raise TaskRefused("only SQL")
        return [Message("user", task.problem)]

    assert check_role(shaped(messages=messages)) != []
    assert check_role(shaped(messages=messages), {AnswerTask: [AnswerTask("SELECT 1"), AnswerTask("SELECT 2")]}) == []


def test_samples_include_feedback_and_results() -> None:
    solve = SolveTask.examples()
    assert any(task.feedback for task in solve)
    assert any(task.results for task in solve)


def test_task_that_is_no_dataclass_of_its_own_is_reported() -> None:
    class Longer(AnswerTask):
        extra: str = ""

    assert task_faults(Longer) == ["Longer must be a dataclass(frozen=True)"]
