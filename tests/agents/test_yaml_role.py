"""Roles from a mapping: every kind of task works, and every fault is reported with its place, key and remedy."""

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from agents import yaml_role
from agents.check_role import check_role
from agents.registry import registered
from agents.role import Message, ReplyUnusable, Sampling, TaskRefused
from agents.tasks import (
    Answer,
    AnswerTask,
    CritiqueTask,
    Plan,
    PlanTask,
    Solution,
    SolveTask,
    Step,
    Text,
    Verdict,
    WriteTask,
)
from agents.yaml_role import SpecError, from_mapping, parse_spec

TASKS = {entry.name: entry.load_task() for entry in registered("task")}
TEXT = {"type": "string"}
STEP = Step(name="2", instruction="Add 20 and 65.", needs=("1",))


def reply(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def spec(task: str, **changes: Any) -> dict[str, Any]:
    """Return a valid mapping for a kind of task, with some keys changed."""
    prompts = {
        "plan": "Split {problem}",
        "solve": "{problem}\n{results}\nDo: {step}\n{feedback}",
        "critique": "{problem}\n{results}\n{step} gave {result}",
        "answer": "{problem}\n{steps}\n{results}",
        "write": "{problem}\n{results}",
        "debate": "{problem}\n{own}\n{others}",
        "judge": "{problem}\n{candidates}",
        "compare": "{problem}\n{answer}\n{expected}",
    }
    replies = {
        "plan": reply(steps={"type": "array", "items": TEXT}),
        "solve": reply(result=TEXT, work=TEXT),
        "critique": reply(accepted={"type": "boolean"}, reason=TEXT),
        "answer": reply(answer=TEXT),
        "write": reply(text=TEXT, notes=TEXT),
        "debate": reply(reasoning=TEXT, answer=TEXT),
        "judge": reply(order={"type": "array", "items": {"type": "integer"}}),
        "compare": reply(accepted={"type": "boolean"}),
    }
    return {"name": "mine", "task": task, "prompt": prompts[task], "reply": replies[task], **changes}


def faults(mapping: object) -> str:
    with pytest.raises(SpecError) as raised:
        parse_spec(mapping, "mine.yaml")
    assert all(line.startswith("mine.yaml: ") for line in str(raised.value).splitlines())
    return str(raised.value)


def test_example_in_the_module_docstring_is_a_role() -> None:
    lines = [line for line in (yaml_role.__doc__ or "").splitlines() if line.startswith("    ")]
    role = from_mapping(yaml.safe_load(textwrap.dedent("\n".join(lines))), "example")
    assert role.takes == (CritiqueTask,)
    assert role.sampling == Sampling(temperature=0.2)
    assert check_role(role) == []
    assert role.messages(CritiqueTask("p", STEP, "85"))[1].content.endswith(
        '{"accepted": true or false, "reason": "..."}\n'
    )


@pytest.mark.parametrize("task", TASKS)
def test_role_of_every_kind_keeps_its_contract(task: str) -> None:
    role = from_mapping(spec(task), "mine.yaml")
    assert role.takes == (TASKS[task],)
    assert check_role(role) == []
    assert type(role)().spec.name == "mine"


def test_two_roles_do_not_share_attributes() -> None:
    plan, answer = from_mapping(spec("plan"), "a"), from_mapping(spec("answer", sampling={"max_tokens": 7}), "b")
    assert plan.takes == (PlanTask,)
    assert answer.takes == (AnswerTask,)
    assert plan.sampling == Sampling()
    assert answer.sampling.max_tokens == 7


def test_prompt_is_filled_and_system_message_is_not() -> None:
    role = from_mapping(spec("solve", system='Reply {"result": ...}'), "mine.yaml")
    task = SolveTask("How long?", STEP, {"1": "20"}, "off by one")
    assert role.messages(task) == [
        Message("system", 'Reply {"result": ...}'),
        Message("user", "How long?\nResult of step 1: 20\nDo: Add 20 and 65.\noff by one"),
    ]
    end = AnswerTask("How long?", (STEP,), {"2": "85"})
    assert from_mapping(spec("answer"), "mine.yaml").messages(end) == [
        Message("user", "How long?\nStep 2: Add 20 and 65.\nResult of step 2 (Add 20 and 65.): 85")
    ]
    judged = CritiqueTask("How long?", STEP, "85", {"1": "20"})
    assert from_mapping(spec("critique"), "mine.yaml").messages(judged) == [
        Message("user", "How long?\nResult of step 1: 20\nAdd 20 and 65. gave 85")
    ]


def test_braces_in_a_problem_are_not_placeholders() -> None:
    problem = "{step} {0} {problem.__class__} }{"
    assert from_mapping(spec("plan"), "mine.yaml").messages(PlanTask(problem)) == [Message("user", f"Split {problem}")]


def test_reply_of_every_kind_is_typed() -> None:
    def parse(task: Any, form: dict[str, Any]) -> Any:
        kind = next(name for name, known in TASKS.items() if isinstance(task, known))
        return from_mapping(spec(kind), "mine.yaml").parse(json.dumps(form), task)

    assert parse(PlanTask("p"), {"steps": ["one", "two", "three"]}) == Plan(
        steps=(
            Step(name="1", instruction="one"),
            Step(name="2", instruction="two", needs=("1",)),
            Step(name="3", instruction="three", needs=("1", "2")),
        )
    )
    assert parse(SolveTask("p", STEP), {"result": "85", "work": "20+65"}) == Solution(result="85", work="20+65")
    assert parse(CritiqueTask("p", STEP, "85"), {"accepted": False, "reason": "no"}) == Verdict(
        accepted=False, reason="no"
    )
    assert parse(AnswerTask("p"), {"answer": "85"}) == Answer(answer="85")


def test_optional_properties_may_be_missing_and_unknown_ones_are_ignored() -> None:
    schema = {
        "type": "object",
        "properties": {"accepted": {"type": "boolean"}, "check": TEXT},
        "required": ["accepted"],
    }
    role = from_mapping(spec("critique", reply=schema), "mine.yaml")
    assert role.parse('{"check": "65+20", "accepted": true}', CritiqueTask("p", STEP, "85")) == Verdict(accepted=True)
    assert role.schema(CritiqueTask("p", STEP, "85")) == schema


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ("}{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "the reply: \\[\\] is not of type 'object'"),
        ('{"result": 85, "work": ""}', "the reply.result: 85 is not of type 'string'"),
        ('{"work": ""}', "'result' is a required property"),
        ('{"result": "", "work": ""}', "result: string should have at least 1 character"),
    ],
)
def test_reply_that_violates_the_schema_is_unusable(text: str, why: str) -> None:
    with pytest.raises(ReplyUnusable, match=why):
        from_mapping(spec("solve"), "mine.yaml").parse(text, SolveTask("p", STEP))


def test_empty_plan_is_unusable() -> None:
    for text in ('{"steps": []}', '{"steps": [""]}'):
        with pytest.raises(ReplyUnusable, match=r"steps|instruction"):
            from_mapping(spec("plan"), "mine.yaml").parse(text, PlanTask("p"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"promt": "x"},
            "promt: unknown key; did you mean prompt? known: name, task, needs, system, prompt, reply, examples, tools",
        ),
        ({"task": "solv"}, "task: no task is named 'solv'; did you mean solve? known: answer, critique"),
        ({"name": ""}, "name: string should have at least 1 character, not ''"),
        ({"prompt": 3}, "prompt: input should be a valid string, not 3"),
        (
            {"prompt": "{stp} {step}"},
            "prompt: {stp} is not a placeholder of this task; did you mean step? known: problem, step",
        ),
        ({"prompt": "{problem}"}, "prompt: {step} is missing"),
        (
            {"prompt": "{step.name}"},
            "prompt: {step.name} is not a placeholder; known: problem, step, results, feedback",
        ),
        ({"prompt": "{step[0]}"}, "prompt: {step[0]} is not a placeholder"),
        ({"prompt": "{} {step}"}, "prompt: {} is not a placeholder"),
        ({"prompt": "{step!r}"}, "prompt: {step} must have no format and no conversion; write {step}"),
        ({"prompt": "{step:>{results}}"}, "prompt: {step} must have no format and no conversion"),
        ({"prompt": '{step} {"a": 1}'}, "to write a literal brace, double it: {{ or }}"),
        ({"prompt": "{step} }"}, "prompt: Single '}' encountered in format string; to write a literal brace"),
        ({"prompt": "{step"}, "prompt: expected '}' before end of string; to write a literal brace"),
        ({"system": "See {problem}"}, "system: {problem} is not a placeholder here; move it to prompt"),
        ({"reply": []}, "reply: input should be a valid dictionary, not []"),
        ({"reply": {"type": "objekt"}}, "reply: not a valid JSON schema: 'objekt' is not valid"),
        ({"reply": {"type": "string"}}, "reply: type must be object"),
        ({"reply": {"type": "object"}}, 'reply: properties.result is missing; add {"type": "string"}'),
        ({"reply": reply(result={"type": "integer"})}, 'reply: properties.result must be {"type": "string"}'),
        ({"reply": reply(result=True)}, 'reply: properties.result must be {"type": "string"}'),
        ({"reply": reply(result=TEXT, work={"type": "array"})}, 'reply: properties.work must be {"type": "string"}'),
        ({"reply": {"type": "object", "properties": {"result": TEXT}}}, "reply: required must contain result"),
        (
            {"reply": reply(result={"type": "string", "pattern": "("})},
            "'(' is not a 'regex' at reply.properties.result",
        ),
        ({"reply": {**reply(result=TEXT), "allOf": [{"$ref": "http://elsewhere/x"}]}}, "$ref is not supported"),
        ({"reply": reply(result=TEXT, no={False: 1})}, "it holds values that JSON does not have; in YAML, quote dates"),
        ({"reply": reply(result={"type": "string", "default": {1, 2}})}, "reply: not JSON: Object of type set"),
        ({"sampling": {"temprature": 1}}, "sampling.temprature: unknown key; did you mean temperature"),
        ({"sampling": {"top_p": 3}}, "sampling.top_p: input should be less than or equal to 1, not 3"),
    ],
)
def test_fault_names_the_key_and_what_would_be_right(changes: dict[str, Any], message: str) -> None:
    assert message in faults({**spec("solve"), **changes})


def test_steps_of_a_plan_must_be_strings() -> None:
    needed = 'reply: properties.steps must be {"type": "array", "items": {"type": "string"}}'
    for steps in ({"type": "array"}, {"type": "array", "items": {"type": "object"}}, {"type": "array", "items": True}):
        assert needed in faults(spec("plan", reply=reply(steps=steps)))


def test_all_faults_are_reported_at_once() -> None:
    reported = faults({"task": "plan", "prompt": "{step}", "reply": {"type": "array"}, "extra": 1})
    assert [line.split(": ")[1] for line in reported.splitlines()] == ["name", "prompt", "reply", "extra"]


@pytest.mark.parametrize("mapping", [None, [], "plan", 3])
def test_role_must_be_a_mapping(mapping: object) -> None:
    assert "a role must be a mapping with the keys name, task, needs, system, prompt, reply" in faults(mapping)


# Free text, needs, examples and tasks of one's own


def test_free_text_is_the_reply_if_the_task_asks_for_one_text() -> None:
    role = from_mapping({"name": "mine", "task": "answer", "prompt": "{problem}"}, "mine.yaml")
    assert role.schema(AnswerTask("p")) is None
    assert role.parse(" 85 ", AnswerTask("p")) == Answer(answer="85")
    with pytest.raises(ReplyUnusable, match="the reply is empty"):
        role.parse(" ", AnswerTask("p"))
    assert check_role(role) == []


@pytest.mark.parametrize("task", ["plan", "critique", "judge"])
def test_task_with_another_reply_than_a_text_needs_a_schema(task: str) -> None:
    mapping = {key: value for key, value in spec(task).items() if key != "reply"}
    assert "reply: this key is missing" in faults(mapping)


def test_role_that_writes_gives_the_properties_of_its_reply() -> None:
    role = from_mapping(spec("write", reply=reply(facts={"type": "array", "items": TEXT})), "mine.yaml")
    assert role.gives == ("facts",)
    assert role.parse('{"facts": ["a", "b"]}', WriteTask("p")) == Text(
        text='{"facts": ["a", "b"]}', values={"facts": ["a", "b"]}
    )
    assert from_mapping(spec("write"), "mine.yaml").parse('{"text": "t", "notes": "n"}', WriteTask("p")) == Text(
        text="t", values={"text": "t", "notes": "n"}
    )


def test_needs_are_placeholders() -> None:
    role = from_mapping(spec("write", needs=["facts"], prompt="{problem}: {facts}"), "mine.yaml")
    assert role.needs == ("facts",)
    assert role.messages(WriteTask("p", {"facts": "a\nb", "others": "c"})) == [Message("user", "p: a\nb")]
    with pytest.raises(TaskRefused, match="the role mine needs 'facts'"):
        role.messages(WriteTask("p"))
    assert check_role(role) == []


def test_examples_come_before_the_task() -> None:
    example = {"problem": "2+2", "reply": {"answer": "4"}}
    mapping = spec("answer", system="Be brief.", prompt="{problem}=", examples=[example])
    assert from_mapping(mapping, "mine.yaml").messages(AnswerTask("1+1")) == [
        Message("system", "Be brief."),
        Message("user", "2+2="),
        Message("assistant", '{"answer": "4"}'),
        Message("user", "1+1="),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"needs": ["facts"]}, "needs: only the task write has results by name; this one has problem, step"),
        ({"needs": ["a-b"]}, "needs.0: string should match pattern"),
        ({"tools": "python"}, "tools: input should be a valid tuple"),
        ({"examples": [{"step": "s"}]}, "example 0 lacks its reply"),
        ({"examples": [{"reply": {"result": "1", "work": ""}}]}, "example 0 lacks step"),
        (
            {"examples": [{"step": "s", "stp": "x", "reply": {"result": "1", "work": ""}}]},
            "example 0: stp is not in the prompt; known: step, reply",
        ),
        (
            {"examples": [{"step": "s", "reply": {"result": 1, "work": ""}}]},
            "example 0: its reply does not fit: the reply.result: 1 is not of type 'string'",
        ),
        (
            {"examples": [{"step": "s", "reply": {"result": "", "work": ""}}]},
            "example 0: its reply does not fit: result: string should have at least 1 character",
        ),
        ({"task": "nowhere.at:All"}, "task: task 'nowhere.at:All' of this file cannot be used: importing"),
        ({"task": 3}, "task: input should be a subclass of Task"),
    ],
)
def test_fault_of_a_further_key_is_named(changes: dict[str, Any], message: str) -> None:
    assert message in faults({**spec("solve"), "prompt": "{step}", **changes})


OWN_TASK = """
from dataclasses import dataclass
from typing import ClassVar
from agents import Reply, Task

class Translation(Reply):
    text: str
    confidence: float = 1.0

@dataclass(frozen=True)
class Translate(Task):
    kind: ClassVar[str] = "translate"
    reply_type: ClassVar[type[Reply]] = Translation
    essential: ClassVar[str] = "language"
    language: str

    @classmethod
    def examples(cls):
        return cls("Good day", "French"), cls("Thank you", "German")
"""


def test_task_of_ones_own_needs_no_code_beside_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "translating.py").write_text(OWN_TASK)
    monkeypatch.syspath_prepend(tmp_path)
    mapping = {"name": "mine", "task": "translating:Translate", "prompt": "{problem} in {language}"}
    role = from_mapping(mapping, "mine.yaml")
    [task] = role.takes
    assert check_role(role) == []
    assert role.messages(task.examples()[0]) == [Message("user", "Good day in French")]
    assert str(role.parse("Bonjour", task.examples()[0])) == '{"text":"Bonjour","confidence":1.0}'
    asked = {**mapping, "reply": reply(text=TEXT, confidence={"type": "string"})}
    assert 'properties.confidence must be {"type": "number"}' in faults(asked)
