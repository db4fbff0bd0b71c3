"""The tokens that a reply to a schema may have."""

from typing import Any

import pytest

from agents import reply_budget
from agents.roles.coder import Coder
from agents.roles.critic import Critic
from agents.roles.judge import Judge
from agents.roles.planner import Planner
from agents.roles.solver import Solver
from agents.tasks import AnswerTask, CritiqueTask, JudgeTask, PlanTask, SolveTask

TEXT = {"type": "string", "maxLength": 300}


def schema(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def test_budget_is_that_of_ordinary_text() -> None:
    assert reply_budget.tokens(schema(answer=TEXT)) == 300 + len("answer") + 6 + reply_budget.SPARE_TOKENS
    listed = {"type": "array", "maxItems": 10, "items": TEXT}
    characters = 10 * (300 + 6) + len("steps") + 6
    assert reply_budget.tokens(schema(steps=listed)) == 400 + (characters - 400) // 3 + 1 + reply_budget.SPARE_TOKENS
    referring = {**schema(answer={"$ref": "#/$defs/Text"}), "$defs": {"Text": TEXT}}
    assert reply_budget.tokens(referring) == reply_budget.tokens(schema(answer=TEXT))


def test_choices_count_with_the_longest() -> None:
    choice = {"anyOf": [{"type": "null"}, {"const": "word"}, {"type": "string", "maxLength": 30}]}
    assert reply_budget.tokens(schema(answer=choice)) == 30 + len("answer") + 6 + reply_budget.SPARE_TOKENS


def test_schema_that_contains_itself_has_no_budget() -> None:
    tree = {"$ref": "#/$defs/Tree", "$defs": {"Tree": schema(child={"$ref": "#/$defs/Tree"})}}
    assert reply_budget.tokens(tree) is None


@pytest.mark.parametrize(
    "unbounded", [{"type": "string"}, {"type": "array", "items": TEXT}, {"type": "array", "maxItems": 3}, {}, True]
)
def test_unbounded_schema_has_no_budget(unbounded: Any) -> None:
    assert reply_budget.tokens(schema(answer=unbounded)) is None


@pytest.mark.parametrize(
    ("role", "task"),
    [
        (Planner(), PlanTask.examples()[0]),
        (Solver(), SolveTask.examples()[0]),
        (Solver(), AnswerTask.examples()[0]),
        (Critic(), CritiqueTask.examples()[0]),
        (Judge(), JudgeTask.examples()[0]),
        (Coder(), AnswerTask.examples()[0]),
    ],
)
def test_shipped_roles_are_bounded_well_below_their_schema(role: Any, task: Any) -> None:
    asked = role.schema(task)
    characters = sum(
        part.get("maxLength", 0) + part.get("maxItems", 0) * part.get("items", {}).get("maxLength", 0)
        for part in asked["properties"].values()
    )
    assert role.max_tokens(task) <= 500 + characters / 3
    assert role.max_tokens(task) < role.sampling.max_tokens
