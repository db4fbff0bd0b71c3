"""A pipeline: seats in order, results by name, and roles that do not fit."""

from typing import Any

import pytest

from agents.role import Role
from agents.tasks import Text, WriteTask
from agents.workflow import Outcome, Unusable
from agents.workflows.pipeline import Pipeline
from agents.yaml_role import from_mapping

TEXT = {"type": "string"}


def role(prompt: str, needs: list[str] | None = None, **properties: Any) -> Role:
    mapping: dict[str, Any] = {"name": "part", "task": "write", "prompt": prompt, "needs": needs or []}
    if properties:
        mapping["reply"] = {"type": "object", "properties": properties, "required": list(properties)}
    return from_mapping(mapping, "part.yaml")


def pipeline(*seats: str) -> Pipeline:
    return Pipeline("Why is the sky blue?", Pipeline.Options(seats=seats))


def test_each_seat_gets_what_the_seats_before_it_gave() -> None:
    workflow = pipeline("researcher", "writer")
    assert workflow.seats(workflow.options) == {"researcher": (WriteTask,), "writer": (WriteTask,)}
    [first] = workflow.begin()
    assert (first.seat, first.task, workflow.ahead()) == ("researcher", WriteTask(workflow.problem), {"writer": 1})
    [second] = workflow.take(first, Text(text="Rayleigh", values={"facts": ["blue", "scatters"], "year": 1871}))
    results = {"researcher": "Rayleigh", "facts": "blue\nscatters", "year": "1871"}
    assert second.task == WriteTask(workflow.problem, results)
    assert workflow.ahead() == {}
    assert workflow.take(second, Text(text="It scatters.")) == []
    assert workflow.outcome == Outcome("It scatters.", None, 0)
    assert [entry.seat for entry in workflow.transcript] == ["researcher", "writer"]


def test_answer_is_the_property_of_that_name() -> None:
    workflow = pipeline("writer")
    [call] = workflow.begin()
    workflow.take(call, Text(text='{"answer": 42}', values={"answer": 42, "why": "so"}))
    assert workflow.outcome == Outcome("42", None, 0)


@pytest.mark.parametrize(("answer", "text"), [(True, "true"), (None, "whole"), ("", "whole"), ([1, 2], "1\n2")])
def test_answer_of_any_type_becomes_text(answer: object, text: str) -> None:
    workflow = pipeline("writer")
    [call] = workflow.begin()
    workflow.take(call, Text(text="whole", values={"answer": answer}))
    assert workflow.outcome == Outcome(text, None, 0)


def test_seat_can_work_again() -> None:
    workflow = pipeline("writer", "editor", "writer")
    [call] = workflow.begin()
    assert workflow.ahead() == {"editor": 1, "writer": 1}
    [call] = workflow.take(call, Text(text="draft"))
    [call] = workflow.take(call, Text(text="shorter"))
    assert call.task == WriteTask(workflow.problem, {"writer": "draft", "editor": "shorter"})


def test_unreadable_reply_is_asked_for_again() -> None:
    workflow = pipeline("writer")
    [call] = workflow.begin()
    [again] = workflow.take(call, Unusable("dots"))
    assert (again.seat, again.variation) == ("writer", 1)


def test_role_that_needs_what_no_seat_before_it_gives_does_not_fit() -> None:
    roles = {
        "researcher": role("{problem}", facts=TEXT),
        "writer": role("{problem} {facts} {researcher}", ["facts", "researcher"]),
    }
    assert list(Pipeline.misfits(Pipeline.Options(seats=("researcher", "writer")), roles)) == []
    assert list(Pipeline.misfits(Pipeline.Options(seats=("writer", "researcher")), roles)) == [
        "team.writer.role: it needs 'facts', which no seat before it in the pipeline gives; known: none",
        "team.writer.role: it needs 'researcher', which no seat before it in the pipeline gives; known: none",
    ]


def test_names_that_clash_do_not_fit() -> None:
    roles = {"researcher": role("{problem}", facts=TEXT, writer=TEXT), "writer": role("{problem}", facts=TEXT)}
    assert list(Pipeline.misfits(Pipeline.Options(seats=("researcher", "writer", "researcher")), roles)) == [
        "team.researcher.role: it gives 'writer', which is also a seat, or given by another one; rename it",
        "team.writer.role: it gives 'facts', which is also a seat, or given by another one; rename it",
        "team.researcher.role: it gives 'writer', which is also a seat, or given by another one; rename it",
    ]


def test_property_that_may_be_missing_is_not_given() -> None:
    mapping = {"name": "part", "task": "write", "prompt": "{problem}"}
    schema = {"type": "object", "properties": {"facts": TEXT, "notes": TEXT}, "required": ["facts"]}
    assert from_mapping({**mapping, "reply": schema}, "part.yaml").gives == ("facts",)
