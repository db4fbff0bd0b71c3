"""Roles without code: a prompt template and a reply schema, usually read from a YAML file.

    name: proof-reader
    task: critique                      # a kind of task, or module:Class for a task that is not registered
    system: You are a careful reader.   # optional; has no placeholders
    prompt: |
      Step: {step}
      Its result: {result}
      Reply in JSON: {{"accepted": true or false, "reason": "..."}}
    reply:                              # optional if the reply is free text
      type: object
      properties: {accepted: {type: boolean}, reason: {type: string}}
      required: [accepted]
    needs: []                           # optional, for the task `write`: results of other seats, as placeholders
    examples:                           # optional: a text for each placeholder of the prompt, and the reply
      - {step: Add 2 and 2., result: "5", reply: {accepted: false, reason: It is 4.}}
    tools: [python]                     # optional: the tools that the model may call
    sampling: {temperature: 0.2}        # optional

`parse_spec` reports every fault of a mapping before the role is used, such as an unknown placeholder, a reply schema
without a property that the task needs, or an example that does not fit the schema.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from string import Formatter
from typing import Annotated, Any, ClassVar

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match
from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails
from referencing import Registry

from agents import registry
from agents.names import nearest
from agents.role import Message, Reply, ReplyUnusable, Role, Sampling, Task, TaskRefused, Value, explain, read_json
from agents.tasks import Text, WriteTask


class SpecError(ValueError):
    """The mapping does not describe a role. The message has a line for each fault, with its source, key and remedy."""


_BRACES = "to write a literal brace, double it: {{ or }}"


def _task_type(name: object) -> object:
    try:
        return registry.find_task(name) if isinstance(name, str) else name
    except registry.RegistryError as error:
        raise ValueError(str(error)) from None


class TemplateSpec(Value):
    """The specification of a role. The module's docstring has an example."""

    name: str = Field(min_length=1)
    task: Annotated[type[Task], BeforeValidator(_task_type)]
    needs: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], ...] = ()
    system: str | None = Field(default=None, min_length=1)
    prompt: str = Field(min_length=1)
    reply: dict[str, Any] | None = Field(default=None, validate_default=True)
    examples: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    sampling: Sampling = Sampling()

    @field_validator("needs", "system", "prompt", "reply", "examples")
    @classmethod
    def _check_rules(cls, value: Any, info: ValidationInfo) -> Any:
        checks: Mapping[str | None, Callable[[Any, Mapping[str, Any]], Iterator[str]]] = {
            "needs": _needs_faults,
            "system": _system_faults,
            "prompt": _prompt_faults,
            "reply": _reply_faults,
            "examples": _example_faults,
        }
        if "task" in info.data and (faults := list(checks[info.field_name](value, info.data))):
            raise ValueError("; ".join(faults))
        return value


class YamlRole(Role):
    """The base class of roles that a TemplateSpec describes. `role_class` creates the subclasses."""

    spec: ClassVar[TemplateSpec]

    def messages(self, task: Task) -> list[Message]:
        spec = self.spec
        messages = [Message("system", spec.system)] if spec.system else []
        for example in spec.examples:
            messages += [
                Message("user", spec.prompt.format_map(example)),
                Message("assistant", _reply_text(example["reply"])),
            ]
        return [*messages, Message("user", spec.prompt.format_map(self._texts(task)))]

    def schema(self, task: Task) -> dict[str, Any] | None:
        return self.spec.reply

    def parse(self, text: str, task: Task) -> Reply:
        try:
            return _read(text, self.spec.reply, type(task).reply_type)
        except ValidationError as error:
            raise ReplyUnusable(explain(error)) from None

    def _texts(self, task: Task) -> dict[str, str]:
        texts = task.texts()
        for name in self.spec.needs:
            if not isinstance(task, WriteTask) or name not in task.results:
                raise TaskRefused(f"the role {self.spec.name} needs {name!r} among the results of the others")
            texts[name] = task.results[name]
        return texts


def from_mapping(mapping: object, place: str) -> YamlRole:
    """Return the role that a mapping describes. `place` is the mapping's source, such as a file. Raise SpecError."""
    return role_class(parse_spec(mapping, place))()


def parse_spec(mapping: object, place: str) -> TemplateSpec:
    """Return the specification in a mapping. `place` is its source, such as a file.

    Raise SpecError with all faults.
    """
    keys = ", ".join(TemplateSpec.model_fields)
    if not isinstance(mapping, dict):
        raise SpecError(f"{place}: a role must be a mapping with the keys {keys}, not a {type(mapping).__name__}")
    try:
        return TemplateSpec.model_validate(mapping)
    except ValidationError as error:
        raise SpecError("\n".join(f"{place}: {_complaint(e)}" for e in error.errors())) from None


def role_class(template: TemplateSpec) -> type[YamlRole]:
    """Return the role class that a specification describes. Its constructor takes no arguments, as for every role."""
    required = template.reply.get("required", []) if template.reply else []

    class Described(YamlRole):
        __doc__ = f"The role {template.name!r} for {template.task.kind} tasks, from a template."
        spec = template
        takes = (template.task,)
        needs = template.needs
        gives = tuple(name for name in required if name != "text") if template.task is WriteTask else ()
        sampling = template.sampling
        tools = template.tools

    return Described


def _read(text: str, schema: Mapping[str, Any] | None, reply_type: type[Reply]) -> Reply:
    """Return the typed reply in a model's text. Raise ReplyUnusable or ValidationError if the text does not fit."""
    if schema is None:
        if not text.strip():
            raise ReplyUnusable("the reply is empty")
        return reply_type.from_form({_text_property(reply_type): text.strip()})
    form = read_json(text)
    fault = best_match(Draft202012Validator(schema, registry=Registry()).iter_errors(form))  # fetches no references
    if fault is not None:
        raise ReplyUnusable(f"{fault.json_path.replace('$', 'the reply', 1)}: {fault.message}")
    if issubclass(reply_type, Text):
        values = {name: value for name, value in form.items() if name != "text"}
        return reply_type(text=str(form.get("text", "")) or _reply_text(form), values=values)
    return reply_type.from_form(form)


def _reply_text(reply: Any) -> str:
    return reply if isinstance(reply, str) else json.dumps(reply, ensure_ascii=False)


def _text_property(reply_type: type[Reply]) -> str:
    """Return the property that free text fills: the only required property, if it is a string. Otherwise return ""."""
    schema = reply_type.form_schema()
    match schema.get("required", []):
        case [name] if schema["properties"][name].get("type") == "string":
            return str(name)
        case _:
            return ""


def _placeholders(data: Mapping[str, Any]) -> tuple[str, ...]:
    return (*data["task"].placeholders(), *data.get("needs", ()))


def _needs_faults(names: tuple[str, ...], data: Mapping[str, Any]) -> Iterator[str]:
    if names and data["task"] is not WriteTask:
        yield f"only the task write has results by name; this one has {', '.join(data['task'].placeholders())}"
    for name in names:
        if name in data["task"].placeholders():
            yield f"{name} is a placeholder of this task already; remove {name} from needs"


def _system_faults(text: str | None, data: Mapping[str, Any]) -> Iterator[str]:
    for name in re.findall(rf"(?<!\{{)\{{({'|'.join(_placeholders(data))})\}}", text or ""):
        yield f"{{{name}}} is not a placeholder here; move it to prompt"


def _prompt_faults(text: str, data: Mapping[str, Any]) -> Iterator[str]:
    known, essential = _placeholders(data), data["task"].essential
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        yield f"{error}; {_BRACES}"
        return
    fields = [(name, style or conversion) for _, name, style, conversion in parts if name is not None]
    for name, style in fields:
        if name in known:
            if style:
                yield f"{{{name}}} must have no format and no conversion; write {{{name}}}"
        elif name.isidentifier():
            yield f"{{{name}}} is not a placeholder of this task; {nearest(name, known)}"
        else:
            yield f"{{{name}}} is not a placeholder; known: {', '.join(known)}; {_BRACES}"
    if essential not in [name for name, _ in fields]:
        yield f"{{{essential}}} is missing; without it the model does not see its task"


def _reply_faults(schema: dict[str, Any] | None, data: Mapping[str, Any]) -> Iterator[str]:
    reply_type: type[Reply] = data["task"].reply_type
    if schema is None:
        if not _text_property(reply_type):
            yield f"this key is missing; a {reply_type.__name__} cannot be read from free text"
        return
    if fault := _schema_fault(schema):
        yield fault
        return
    if issubclass(reply_type, Text):  # any object is a text
        return
    form = reply_type.form_schema()
    properties, required = schema.get("properties", {}), form.get("required", ())
    needed = {name: _bare(part) for name, part in form["properties"].items()}
    for name, bare in needed.items():
        if name in properties and "type" in bare and not _has_type(properties[name], bare):
            yield f"properties.{name} must be {json.dumps(bare)}; it may have further limits, such as maxLength"
    for name in required:
        if name not in properties:
            yield f"properties.{name} is missing; add {json.dumps(needed[name])}"
        if name not in schema.get("required", ()):
            yield f"required must contain {name}"


def _example_faults(examples: tuple[Mapping[str, Any], ...], data: Mapping[str, Any]) -> Iterator[str]:
    if "prompt" not in data or "reply" not in data:
        return  # a fault of `prompt` or `reply` has been reported already
    used = {name for _, name, _, _ in Formatter().parse(data["prompt"]) if name is not None}
    for number, example in enumerate(examples):
        for name in sorted(used - set(example)):
            yield f"example {number} lacks {name}, which the prompt has as a placeholder"
        for name in sorted(set(example) - used - {"reply"}):
            yield f"example {number}: {name} is not in the prompt; known: {', '.join([*sorted(used), 'reply'])}"
        for name in sorted(used & set(example)):
            if not isinstance(example[name], str):
                yield f"example {number}: {name} must be text, not {example[name]!r}; quote it"
        if "reply" not in example:
            yield f"example {number} lacks its reply"
            continue
        try:
            _read(_reply_text(example["reply"]), data["reply"], data["task"].reply_type)
        except ReplyUnusable as error:
            yield f"example {number}: its reply does not fit: {error}"
        except ValidationError as error:
            yield f"example {number}: its reply does not fit: {explain(error)}"


def _schema_fault(schema: dict[str, Any]) -> str | None:
    """Return why a schema is invalid, or None. It must be a JSON schema of an object, without $ref."""
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


def _bare(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a property's schema with its types only, without limits such as maxLength."""
    bare = {key: schema[key] for key in ("type",) if key in schema}
    return {**bare, "items": _bare(schema["items"])} if "items" in schema else bare


def _complaint(error: ErrorDetails) -> str:
    """Return one fault as text: the key, what is wrong, and what would be right."""
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
