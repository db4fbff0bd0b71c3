"""What is wrong with a role: it is held against its contract over sample tasks, without a model.

Owns the sample tasks. Refuses nothing: every fault is a line of the list that comes back, however the role fails.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from agents.role import (
    REPLIES,
    TASKS,
    AnswerTask,
    CritiqueTask,
    Message,
    PlanTask,
    ReplyUnusable,
    Role,
    Sampling,
    SolveTask,
    Step,
    Task,
    TaskRefused,
    Verdict,
)

_LANGUAGE = "A train leaves at 9:40 and arrives at 11:05. How long does it travel?"
_HOURS = Step(name="1", instruction="Count the minutes from 9:40 to 10:00.")
_REST = Step(name="2", instruction="Add the minutes from 10:00 to 11:05.", needs=("1",))
_SUM = Step(name="A", instruction="12+7")
_PRODUCT = Step(name="B", instruction="A*3", needs=("A",))

SAMPLES: Mapping[str, tuple[Task, ...]] = {
    "plan": (PlanTask("12+7"), PlanTask("(12+7)*3"), PlanTask(_LANGUAGE)),
    "solve": (
        SolveTask("12+7", _SUM),
        SolveTask("(12+7)*3", _PRODUCT, {"A": "19"}),
        SolveTask("(12+7)*3", _PRODUCT, {"A": "19"}, feedback="the inverse operation does not give it back"),
        SolveTask("12+7", Step(name="1", instruction="Add 12 and 7.")),
        SolveTask(_LANGUAGE, _REST, {"1": "20 minutes"}),
    ),
    "critique": (
        CritiqueTask("12+7", _SUM, "19"),
        CritiqueTask("(12+7)*3", _PRODUCT, "57", {"A": "19"}),
        CritiqueTask("12+7", _SUM, "nineteen"),
        CritiqueTask("12+7", _SUM, "1" * 40),
        CritiqueTask(_LANGUAGE, _REST, "85 minutes", {"1": "20 minutes"}),
    ),
    "answer": (
        AnswerTask("12+7"),
        AnswerTask("(12+7)*3", (_SUM, _PRODUCT), {"A": "19", "B": "57"}),
        AnswerTask(_LANGUAGE, (_HOURS, _REST), {"1": "20 minutes", "2": "85 minutes"}),
    ),
}
"""Tasks of each kind: the embedded team's arithmetic, plain language, and both in one team."""

RUBBISH = ("", "}{", "[]", "null", '{"":')
"""Texts that no model means as a reply."""

_SPEAKERS = ("system", "user", "assistant")


def check_role(role: Role, samples: Mapping[str, Sequence[Task]] = SAMPLES) -> list[str]:
    """What is wrong with a role, a line each; empty when it keeps its contract over the samples.

    A role may refuse what is out of its range (TaskRefused), but not every sample of a kind that it takes.
    """
    if faults := form_faults(type(role)):
        return faults
    kinds = [kind for kind, task in TASKS.items() if task in role.takes]
    return list(dict.fromkeys(fault for kind in kinds for fault in _kind_faults(role, kind, samples[kind])))


def form_faults(role: type[Role]) -> list[str]:
    """What is wrong with a role before it is asked anything: its `takes` and its `sampling`."""
    known = ", ".join(task.__name__ for task in TASKS.values())
    faults = []
    takes: object = getattr(role, "takes", None)
    if not isinstance(takes, tuple) or not takes:
        faults.append(f"takes is {takes!r}: it has to be a tuple of one or more of {known}")
    elif strange := [task for task in takes if task not in TASKS.values()]:
        faults.append(f"takes holds {', '.join(map(repr, strange))}: the kinds of task are {known}")
    sampling: object = role.sampling
    if not isinstance(sampling, Sampling):
        faults.append(f"sampling is {sampling!r}: it has to be an agents.role.Sampling")
    return faults


def described(error: BaseException) -> str:
    """A foreign exception in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _kind_faults(role: Role, kind: str, tasks: Sequence[Task]) -> Iterator[str]:
    taken, refusals = [], []
    for task in tasks:
        try:
            role.check(task.problem)
            taken.append((task, role.messages(task)))
        except TaskRefused as error:
            refusals.append(str(error))
        except Exception as error:  # noqa: BLE001  a third party's code may raise anything
            yield f"{kind}: {described(error)} for {task}; what a role cannot take it refuses with TaskRefused"
    if refusals and len(refusals) == len(tasks):
        yield f"{kind}: it takes this kind of task, yet refuses all {len(tasks)} samples, the last for: {refusals[-1]}"
    for task, messages in taken:
        yield from (f"{kind}: {fault}, for {task}" for fault in _message_faults(role, task, messages))
        schema, faults = _schema(role, task)
        faults += _parse_faults(role, task, schema)
        yield from (f"{kind}: {fault}" for fault in faults)
    if len(taken) > 1 and all(messages == taken[0][1] for _, messages in taken):
        yield f"{kind}: messages() says the same for every task; the model has to be told the task"


def _message_faults(role: Role, task: Task, messages: object) -> Iterator[str]:
    if not isinstance(messages, list) or not messages or not all(isinstance(m, Message) for m in messages):
        yield f"messages() gave {messages!r}: it has to be a list of one or more agents.role.Message"
        return
    for message in messages:
        if message.role not in _SPEAKERS:
            yield f"a message's role is {message.role!r}: it is one of {', '.join(_SPEAKERS)}"
        if not isinstance(message.content, str) or not message.content.strip():
            yield f"the {message.role} message is {message.content!r}: it has to be text"
    try:
        again: object = role.messages(task)
    except Exception as error:  # noqa: BLE001  a third party's code may raise anything
        again = described(error)
    if again != messages:
        yield f"messages() gave {messages!r} and then {again!r}: the same task has to give the same messages"


def _schema(role: Role, task: Task) -> tuple[dict[str, Any] | None, list[str]]:
    """The role's schema where it has a sound one, and what is wrong with it where it has not."""
    try:
        schema: object = role.schema(task)
        if schema is None:
            return None, []
        if not isinstance(schema, dict):
            return None, [f"schema() gave {schema!r}: it has to be None or a JSON schema"]
        json.dumps(schema)
        Draft202012Validator.check_schema(schema)
        return schema, []
    except SchemaError as error:
        return None, [f"schema() gave no valid JSON schema: {error.message} at {error.json_path}"]
    except Exception as error:  # noqa: BLE001  a third party's code may raise anything
        return None, [f"schema() raised {described(error)}"]


def _parse_faults(role: Role, task: Task, schema: dict[str, Any] | None) -> Iterator[str]:
    expected = REPLIES[type(task)]
    for text in (*RUBBISH, *_examples(schema)):
        try:
            reply: object = role.parse(text, task)
        except ReplyUnusable:
            continue
        except Exception as error:  # noqa: BLE001  a third party's code may raise anything
            yield f"parse({text!r}) raised {described(error)}; what cannot be read it refuses with ReplyUnusable"
            continue
        may_read = text and schema is None and expected is not Verdict
        if not isinstance(reply, expected):
            yield f"parse({text!r}) gave {reply!r}: the reply to a {type(task).__name__} is a {expected.__name__}"
        elif text in RUBBISH and not may_read:  # in free text a result may be anything but empty, a verdict may not
            yield f"parse({text!r}) gave {reply!r}: what cannot be read it refuses with ReplyUnusable"


def _examples(schema: dict[str, Any] | None) -> list[str]:
    """A reply that the schema allows, as JSON; none where it is too rich to make one up."""
    if schema is None:
        return []
    try:
        example = _example(schema, schema.get("$defs", {}))
        return [json.dumps(example)] if Draft202012Validator(schema).is_valid(example) else []
    except Exception:  # noqa: BLE001  references that lead nowhere, endless recursion, a pattern that is none
        return []


def _example(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Any:
    """The plainest value of a schema: what pydantic and a YAML role write, no combinations."""
    match schema:
        case {"$ref": str(place)}:
            return _example(definitions[place.removeprefix("#/$defs/")], definitions)
        case {"const": value} | {"enum": [value, *_]}:
            return value
        case {"type": "object"}:
            fields = schema.get("properties", {})
            return {key: _example(fields.get(key, {}), definitions) for key in schema.get("required", fields)}
        case {"type": "array"}:
            return [_example(schema.get("items", {}), definitions)] * max(1, schema.get("minItems", 1))
        case {"type": "integer" | "number"}:
            return schema.get("minimum", 1)
        case {"type": "boolean"}:
            return True
        case _:
            return "1" * max(1, schema.get("minLength", 1))
