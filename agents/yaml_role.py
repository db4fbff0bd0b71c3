"""Roles without code: a prompt template and a reply schema, usually read from a YAML file.

    name: proof-reader
    task: critique                      # plan, solve, critique or answer
    system: You are a careful reader.   # optional; has no placeholders
    prompt: |
      Step: {step}
      Its result: {result}
      Reply in JSON: {{"accepted": true or false, "reason": "..."}}
    reply:
      type: object
      properties: {accepted: {type: boolean}, reason: {type: string}}
      required: [accepted]
    sampling: {temperature: 0.2}        # optional

This module defines the placeholders of each kind of task and the properties that its reply needs. A mapping that could
only fail later is refused when it is read: an unknown placeholder, a reply schema without the needed properties.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, ClassVar, Literal

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from agents.names import nearest
from agents.planner import numbered_plan
from agents.role import (
    TASKS,
    Answer,
    AnswerTask,
    CritiqueTask,
    Message,
    PlanTask,
    Reply,
    ReplyUnusable,
    Role,
    Sampling,
    Solution,
    SolveTask,
    Task,
    Value,
    Verdict,
    explain,
    read_json,
)
from agents.solver import results_so_far


class SpecError(ValueError):
    """A mapping that does not describe a role. The message has a line for each fault: place, key and remedy."""


@dataclass(frozen=True)
class _Kind:
    """The rules for one kind of task.

    A prompt may use `placeholders` and must use `essential`. `required` and `optional` hold the JSON schema of each
    property of the reply.
    """

    placeholders: tuple[str, ...]
    essential: str
    required: Mapping[str, Mapping[str, Any]]
    optional: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_TEXT = {"type": "string"}
_KINDS: Mapping[str, _Kind] = {
    "plan": _Kind(("problem",), "problem", {"steps": {"type": "array", "items": _TEXT}}),
    "solve": _Kind(("problem", "step", "results", "feedback"), "step", {"result": _TEXT}, {"work": _TEXT}),
    "critique": _Kind(
        ("problem", "step", "result", "results"), "result", {"accepted": {"type": "boolean"}}, {"reason": _TEXT}
    ),
    "answer": _Kind(("problem", "steps", "results"), "problem", {"answer": _TEXT}),
}

_BRACES = "to write a literal brace, double it: {{ or }}"


class TemplateSpec(Value):
    """A role as its author wrote it. The module's docstring has an example."""

    name: str = Field(min_length=1)
    task: Literal["plan", "solve", "critique", "answer"]
    system: str | None = Field(default=None, min_length=1)
    prompt: str = Field(min_length=1)
    reply: dict[str, Any]
    sampling: Sampling = Sampling()

    @field_validator("system", "prompt", "reply")
    @classmethod
    def _check_rules(cls, value: Any, info: ValidationInfo) -> Any:
        checks: Mapping[str | None, Callable[[Any, _Kind], Iterator[str]]] = {
            "system": _system_faults,
            "prompt": _prompt_faults,
            "reply": _reply_faults,
        }
        kind = _KINDS.get(info.data.get("task", ""))
        if kind and (faults := list(checks[info.field_name](value, kind))):
            raise ValueError("; ".join(faults))
        return value


class YamlRole(Role):
    """The base of roles that a TemplateSpec describes. `role_class` creates the subclass."""

    spec: ClassVar[TemplateSpec]

    def messages(self, task: Task) -> list[Message]:
        system = [Message("system", self.spec.system)] if self.spec.system else []
        return [*system, Message("user", self.spec.prompt.format_map(_filled(task)))]

    def schema(self, task: Task) -> dict[str, Any]:
        return self.spec.reply

    def parse(self, text: str, task: Task) -> Reply:
        form = read_json(text)
        fault = best_match(Draft202012Validator(self.spec.reply).iter_errors(form))
        if fault is not None:
            raise ReplyUnusable(f"{fault.json_path.replace('$', 'the reply', 1)}: {fault.message}")
        try:
            return _read(form, task)
        except ValidationError as error:
            raise ReplyUnusable(explain(error)) from None


def from_mapping(mapping: object, place: str) -> YamlRole:
    """Return the role that a mapping describes. `place` is its source, such as a file. Raise SpecError."""
    return role_class(parse_spec(mapping, place))()


def parse_spec(mapping: object, place: str) -> TemplateSpec:
    """Return the specification in a mapping. `place` is its source, such as a file. Raise SpecError with all faults."""
    keys = ", ".join(TemplateSpec.model_fields)
    if not isinstance(mapping, dict):
        raise SpecError(f"{place}: a role must be a mapping with the keys {keys}, not a {type(mapping).__name__}")
    try:
        return TemplateSpec.model_validate(mapping)
    except ValidationError as error:
        raise SpecError("\n".join(f"{place}: {_complaint(e)}" for e in error.errors())) from None


def role_class(template: TemplateSpec) -> type[YamlRole]:
    """Return the role class that a specification describes. Like any role, it is created without arguments."""

    class Described(YamlRole):
        __doc__ = f"The role {template.name!r} for {template.task} tasks, from a template."
        spec = template
        takes = (TASKS[template.task],)
        sampling = template.sampling

    return Described


def _filled(task: Task) -> dict[str, str]:
    """Return the text for each placeholder of the task. Results and steps take one line each."""
    match task:
        case PlanTask():
            return {"problem": task.problem}
        case SolveTask():
            results = "\n".join(results_so_far(task.results))
            step = task.step.instruction
            return {"problem": task.problem, "step": step, "results": results, "feedback": task.feedback}
        case CritiqueTask():
            results = "\n".join(results_so_far(task.results))
            step = task.step.instruction
            return {"problem": task.problem, "step": step, "result": task.result, "results": results}
        case AnswerTask():
            steps = "\n".join(f"Step {step.name}: {step.instruction}" for step in task.steps)
            results = "\n".join(results_so_far(task.results, task.steps))
            return {"problem": task.problem, "steps": steps, "results": results}


def _read(form: Mapping[str, Any], task: Task) -> Reply:
    """Return the typed reply in a form that fits the role's schema. Raise ValidationError for an empty text."""
    match task:
        case PlanTask():
            return numbered_plan(form["steps"])
        case SolveTask():
            return Solution(result=form["result"], work=form.get("work", ""))
        case CritiqueTask():
            return Verdict(accepted=form["accepted"], reason=form.get("reason", ""))
        case AnswerTask():
            return Answer(answer=form["answer"])


def _system_faults(text: str | None, kind: _Kind) -> Iterator[str]:
    for name in re.findall(rf"(?<!\{{)\{{({'|'.join(kind.placeholders)})\}}", text or ""):
        yield f"{{{name}}} is not a placeholder here; move it to prompt"


def _prompt_faults(text: str, kind: _Kind) -> Iterator[str]:
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        yield f"{error}; {_BRACES}"
        return
    fields = [(name, style or conversion) for _, name, style, conversion in parts if name is not None]
    for name, style in fields:
        if name in kind.placeholders:
            if style:
                yield f"{{{name}}} must have no format and no conversion; write {{{name}}}"
        elif name.isidentifier():
            yield f"{{{name}}} is not a placeholder of this task; {nearest(name, kind.placeholders)}"
        else:
            yield f"{{{name}}} is not a placeholder; known: {', '.join(kind.placeholders)}; {_BRACES}"
    if kind.essential not in [name for name, _ in fields]:
        yield f"{{{kind.essential}}} is missing; without it the model does not see its task"


def _reply_faults(schema: dict[str, Any], kind: _Kind) -> Iterator[str]:
    if fault := _schema_fault(schema):
        yield fault
        return
    properties = schema.get("properties", {})
    for name, needed in {**kind.required, **kind.optional}.items():
        if name in properties and not _has_type(properties[name], needed):
            yield f"properties.{name} must be {json.dumps(needed)}; it may have further limits, such as maxLength"
    for name, needed in kind.required.items():
        if name not in properties:
            yield f"properties.{name} is missing; add {json.dumps(needed)}"
        if name not in schema.get("required", ()):
            yield f"required must contain {name}"


def _schema_fault(schema: dict[str, Any]) -> str | None:
    """Return why a schema cannot be used, or None. It must be valid JSON, a JSON schema of an object, without $ref."""
    try:
        text = json.dumps(schema)
        if json.loads(text) != schema:
            return "it holds values that JSON does not have; in YAML, quote dates and words such as yes, no and on"
        Draft202012Validator.check_schema(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    except SchemaError as error:
        return f"not a valid JSON schema: {error.message} at {error.json_path.replace('$', 'reply', 1)}"
    except (TypeError, ValueError) as error:
        return f"not JSON: {error}"
    if schema.get("type") != "object":
        return "type must be object"
    if '"$ref": "' in text or '"$dynamicRef": "' in text:
        return "$ref is not supported; write the schema without references"
    return None


def _has_type(schema: object, needed: Mapping[str, Any]) -> bool:
    if not isinstance(schema, dict) or schema.get("type") != needed["type"]:
        return False
    return "items" not in needed or _has_type(schema.get("items"), needed["items"])


def _complaint(error: ErrorDetails) -> str:
    """Return one fault as text: the key, what is wrong with it, and what would be right."""
    key = ".".join(map(str, error["loc"]))
    match error["type"]:
        case "extra_forbidden":
            known = Sampling.model_fields if len(error["loc"]) > 1 else TemplateSpec.model_fields
            return f"{key}: unknown key; {nearest(str(error['loc'][-1]), known)}"
        case "missing":
            return f"{key}: this key is missing"
        case "value_error":
            return f"{key}: {error['ctx']['error']}"
        case _:
            return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"
