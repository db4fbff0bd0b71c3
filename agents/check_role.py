"""Checks a role against its contract with sample tasks, without a model.

The check never raises. It returns the role's faults as a list of lines.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from agents import json_example
from agents.role import Message, Reply, ReplyUnusable, Role, Sampling, Task, TaskRefused
from agents.tasks import WriteTask

RUBBISH = ("", "}{", "[]", "null", '{"":')
"""Texts that a role must refuse. A role that reads free text may accept those that are not empty."""

_SPEAKERS = ("system", "user", "assistant")


def check_role(role: Role, samples: Mapping[type[Task], Sequence[Task]] | None = None) -> list[str]:
    """Return one line for each fault of a role. The list is empty if the role keeps its contract.

    `samples` maps each class of tasks to sample tasks. The default is the `examples` of each class. A role may refuse
    some samples with TaskRefused, but must accept at least one sample of each kind that it takes.
    """
    try:
        return class_faults(type(role)) or list(dict.fromkeys(_faults(role, samples)))
    except Exception as error:  # noqa: BLE001  a plug-in's attributes and examples may raise anything
        return [f"the check raised {described(error)}"]


def _faults(role: Role, samples: Mapping[type[Task], Sequence[Task]] | None) -> Iterator[str]:
    for kind in role.takes:
        try:
            tasks = list(kind.examples()) if samples is None else samples[kind]
        except Exception as error:  # noqa: BLE001  as above
            yield f"{kind.kind}: {kind.__name__}.examples() raised {described(error)}"
            continue
        yield from _kind_faults(role, kind.kind, _with_needs(role, tasks))


def class_faults(role: type[Role]) -> list[str]:
    """Return the faults of a role's class attributes: `takes`, `needs`, `gives`, `tools` and `sampling`."""
    faults = []
    takes: object = getattr(role, "takes", None)
    if not isinstance(takes, tuple) or not takes:
        faults.append(f"takes is {takes!r}: it must be a tuple of one or more kinds of task, such as (AnswerTask,)")
    else:
        faults += [fault for task in takes for fault in task_faults(task)]
    for name in ("needs", "gives", "tools"):
        names: object = getattr(role, name)
        if not isinstance(names, tuple) or not all(isinstance(part, str) and part for part in names):
            faults.append(f"{name} is {names!r}: it must be a tuple of names")
    sampling: object = role.sampling
    if not isinstance(sampling, Sampling):
        faults.append(f"sampling is {sampling!r}: it must be an agents.Sampling")
    return faults


def task_faults(task: object) -> list[str]:
    """Return the faults of a kind of task."""
    if not isinstance(task, type) or not issubclass(task, Task):
        return [f"{task!r} is not a kind of task: it must be a subclass of agents.Task"]
    faults = []
    if not getattr(vars(task).get("__dataclass_params__"), "frozen", False):
        faults.append(f"{task.__name__} must be a dataclass(frozen=True)")
    kind: object = getattr(task, "kind", None)
    if not isinstance(kind, str) or not kind:
        faults.append(f"{task.__name__}.kind is {kind!r}: it must be a name")
    reply: object = getattr(task, "reply_type", None)
    if not isinstance(reply, type) or not issubclass(reply, Reply):
        faults.append(f"{task.__name__}.reply_type is {reply!r}: it must be a subclass of agents.Reply")
    if not faults and task.essential not in task.placeholders():
        faults.append(f"{task.__name__}.essential is {task.essential!r}: known: {', '.join(task.placeholders())}")
    return faults


def described(error: BaseException) -> str:
    """Return the type and message of an exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _with_needs(role: Role, tasks: Sequence[Task]) -> list[Task]:
    """Return the tasks. Add a text to each WriteTask for each result that the role needs."""
    needs = dict.fromkeys(role.needs, "85 minutes")
    return [replace(task, results={**task.results, **needs}) if isinstance(task, WriteTask) else task for task in tasks]


def _kind_faults(role: Role, kind: str, tasks: Sequence[Task]) -> Iterator[str]:
    accepted, refusals = [], []
    for task in tasks:
        try:
            role.check(task.problem)
            accepted.append((task, role.messages(task)))
        except TaskRefused as error:
            refusals.append(str(error))
        except Exception as error:  # noqa: BLE001  a plug-in may raise anything
            yield f"{kind}: {described(error)} for {task}; to refuse a task, raise TaskRefused"
    if refusals and len(refusals) == len(tasks):
        yield f"{kind}: the role takes this kind of task but refuses all {len(tasks)} samples; last: {refusals[-1]}"
    for task, messages in accepted:
        yield from (f"{kind}: {fault}, for {task}" for fault in _message_faults(role, task, messages))
        schema, faults = _schema(role, task)
        faults += _budget_faults(role, task)
        faults += _parse_faults(role, task, schema)
        yield from (f"{kind}: {fault}" for fault in faults)
    if len(accepted) > 1 and all(messages == accepted[0][1] for _, messages in accepted):
        yield f"{kind}: messages() returned the same messages for every task; they must tell the model the task"


def _message_faults(role: Role, task: Task, messages: object) -> Iterator[str]:
    if not isinstance(messages, list) or not messages or not all(isinstance(m, Message) for m in messages):
        yield f"messages() returned {messages!r}: it must be a list of one or more agents.Message"
        return
    for message in messages:
        if message.role not in _SPEAKERS:
            yield f"a message's role is {message.role!r}: it must be one of {', '.join(_SPEAKERS)}"
        if not isinstance(message.content, str) or not message.content.strip():
            yield f"the content of the {message.role} message is {message.content!r}: it must be text"
    try:
        second: object = role.messages(task)
    except Exception as error:  # noqa: BLE001  a plug-in may raise anything
        second = described(error)
    if second != messages:
        yield f"messages() returned {messages!r} and then {second!r}: the same task must give the same messages"


def _schema(role: Role, task: Task) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the role's schema and its faults. The schema is None if the role has none, or an invalid one."""
    try:
        schema: object = role.schema(task)
        if schema is None:
            return None, []
        if not isinstance(schema, dict):
            return None, [f"schema() returned {schema!r}: it must be None or a JSON schema"]
        json.dumps(schema)
        Draft202012Validator.check_schema(schema)
        return schema, []
    except SchemaError as error:
        return None, [f"schema() returned an invalid JSON schema: {error.message} at {error.json_path}"]
    except Exception as error:  # noqa: BLE001  a plug-in may raise anything
        return None, [f"schema() raised {described(error)}"]


def _budget_faults(role: Role, task: Task) -> Iterator[str]:
    try:
        tokens: object = role.max_tokens(task)
    except Exception as error:  # noqa: BLE001  a plug-in may raise anything
        yield f"max_tokens() raised {described(error)}"
        return
    if not isinstance(tokens, int) or tokens < 1:
        yield f"max_tokens() returned {tokens!r}: it must be a number of tokens"


def _parse_faults(role: Role, task: Task, schema: dict[str, Any] | None) -> Iterator[str]:
    expected = type(task).reply_type
    for text in (*RUBBISH, *_example_texts(schema)):
        try:
            reply: object = role.parse(text, task)
        except ReplyUnusable:
            continue
        except Exception as error:  # noqa: BLE001  a plug-in may raise anything
            yield f"parse({text!r}) raised {described(error)}; to refuse a text, raise ReplyUnusable"
            continue
        # Any text that is not empty can be a free-text reply, unless the reply needs a number or a boolean.
        acceptable = text and schema is None and not _has_number_or_boolean(expected.form_schema())
        if type(reply) is not expected:
            yield f"parse({text!r}) returned {reply!r}: the reply to {type(task).__name__} must be {expected.__name__}"
        elif text in RUBBISH and not acceptable:
            yield f"parse({text!r}) returned {reply!r}: to refuse a text, raise ReplyUnusable"


def _has_number_or_boolean(schema: dict[str, Any]) -> bool:
    required = [schema["properties"][name] for name in schema.get("required", ())]
    return any(part.get("items", part).get("type") in ("boolean", "integer", "number") for part in required)


def _example_texts(schema: dict[str, Any] | None) -> list[str]:
    """Return a list of one JSON text that fits the schema, or an empty list if the schema is too complex."""
    if schema is None:
        return []
    try:
        example = json_example.example(schema)
        return [json.dumps(example)] if Draft202012Validator(schema).is_valid(example) else []
    except Exception:  # noqa: BLE001  dangling references, endless recursion, invalid patterns
        return []
