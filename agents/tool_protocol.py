"""The protocol by which a role's model calls tools: JSON that a grammar enforces.

Any chat model can follow the protocol. While tools are offered, the model replies with one of two objects:

    {"tool": "python", "arguments": {"code": "print(2**64)"}}
    {"reply": ...}                          # a value that fits the role's schema; a string if the role has none

The schema of the request admits nothing else. Troupe uses the protocol even for models that have a native format for
tool calls. `troupe serve` uses the native formats for clients that bring their own tools.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agents import cut_json
from agents.role import Message, ReplyUnusable, read_json
from agents.tool import ToolSpec

_OFFER = """You may use tools. Reply with one JSON object: either a tool call,
{"tool": "<name>", "arguments": {...}}, whose output you are then given, or your reply,
{"reply": what you are asked for}. The tools:"""
_NOT_IN_GRAMMARS = frozenset(
    {
        "multipleOf",
        "uniqueItems",
        "contains",
        "minContains",
        "maxContains",
        "format",
        "propertyNames",
        "patternProperties",
    }
)
_NAMED_SCHEMAS = frozenset({"properties", "$defs", "definitions"})
_LAST = 'You have used all your tool calls. Reply now: {"reply": ...}'


@dataclass(frozen=True)
class ToolCall:
    """A tool call. `text` is the whole message in which the model made the call."""

    tool: str
    arguments: Mapping[str, Any]
    text: str

    def __str__(self) -> str:
        return f"{self.tool} {json.dumps(self.arguments, ensure_ascii=False)}"


@dataclass(frozen=True)
class ToolUse:
    """A finished tool call. `output` is the tool's output, or the error message if the call `failed`."""

    call: ToolCall
    output: str
    failed: bool = False


def messages(chat: Sequence[Message], tools: Sequence[ToolSpec], past: Sequence[ToolUse], left: int) -> list[Message]:
    """Return a role's chat with a description of the tools, and with the past tool calls and their outputs.

    `left` is the number of tool calls that the model may still make.
    """
    listed = [
        f"- {tool.name}: {tool.description}\n  arguments: {json.dumps(dict(tool.parameters), ensure_ascii=False)}"
        for tool in tools
    ]
    offer = "\n".join([_OFFER, *listed])
    system = [message for message in chat if message.role == "system"]
    others = [_as_reply(message) for message in chat if message.role != "system"]
    texts = [*(message.content for message in system), offer]
    extended = [Message("system", "\n\n".join(texts)), *others]
    for use in past:
        heading = f"{use.call.tool} failed" if use.failed else f"Output of {use.call.tool}"
        extended += [Message("assistant", use.call.text), Message("user", f"{heading}:\n{use.output}")]
    if past and not left:
        last = extended.pop()
        extended.append(Message("user", f"{last.content}\n\n{_LAST}"))
    return extended


def _as_reply(message: Message) -> Message:
    """Return a message of the chat. Write an assistant message, which is an example, as a reply of the protocol."""
    if message.role != "assistant":
        return message
    try:
        reply = json.loads(message.content)
    except ValueError:
        reply = message.content
    return Message("assistant", json.dumps({"reply": reply}, ensure_ascii=False))


def schema(tools: Sequence[ToolSpec], reply: Mapping[str, Any] | None, left: int) -> dict[str, Any]:
    """Return the JSON schema that admits a reply, and also a tool call unless `left` is 0."""
    parts: dict[str, Mapping[str, Any]] = {"reply": reply or {"type": "string", "minLength": 1}}
    if left:
        parts |= {f"tool{number}": _enforceable(tool.parameters) for number, tool in enumerate(tools)}
    forms = [_object({"reply": {"$ref": "#/$defs/reply"}})]
    forms += [
        _object({"tool": {"const": tool.name}, "arguments": {"$ref": f"#/$defs/tool{number}"}})
        for number, tool in enumerate(tools)
        if left
    ]
    definitions = {name: _embedded(part, f"#/$defs/{name}") for name, part in parts.items()}
    return {"anyOf": forms, "$defs": definitions}


def read(text: str, ended_early: bool = False) -> ToolCall | str:
    """Return the tool call in a model's text, or the text of its reply. Raise ReplyUnusable if the text is neither.

    If a reply ended early, return the values that are complete, or all of a free text. A tool call that ended early is
    unusable, because arguments may be missing.
    """
    if ended_early and not _is_whole(text):
        return _beginning(text)
    match read_json(text):
        case {"tool": str(tool), "arguments": dict(arguments)}:
            return ToolCall(tool, arguments, text)
        case {"reply": str(reply)}:
            return reply
        case {"reply": reply}:
            return json.dumps(reply, ensure_ascii=False)
        case _:
            raise ReplyUnusable('neither a tool call, {"tool": ..., "arguments": ...}, nor {"reply": ...}')


def _is_whole(text: str) -> bool:
    try:
        json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return False
    return True


def _beginning(text: str) -> str:
    """Return the text of a reply that ended early. Raise ReplyUnusable if the text is a tool call, or too short."""
    match cut_json.beginning(text):
        case {"reply": str(reply)} if reply.strip():
            return reply
        case {"reply": dict() | list()}:
            return json.dumps(json.loads(cut_json.closed(text))["reply"], ensure_ascii=False)
        case _:
            raise ReplyUnusable("the tool call or the reply is incomplete")


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _embedded(part: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return a schema that is valid below `place`, a JSON pointer: rewrite its references to start from there."""

    def moved(value: Any) -> Any:
        match value:
            case {"$ref": str(target), **others} if target.startswith("#"):
                return {**others, "$ref": place + target.removeprefix("#")}
            case dict():
                return {key: moved(inner) for key, inner in value.items()}
            case list():
                return [moved(inner) for inner in value]
            case _:
                return value

    return {key: moved(value) for key, value in part.items()}


def _enforceable(schema: Any) -> Any:
    """Return a tool's schema without the keywords that make vLLM refuse a grammar. The runtime checks these itself."""
    match schema:
        case dict():
            kept = {key: value for key, value in schema.items() if key not in _NOT_IN_GRAMMARS}
            if "pattern" in kept:
                kept = {key: value for key, value in kept.items() if key not in ("minLength", "maxLength")}
            return {
                key: {name: _enforceable(inner) for name, inner in value.items()}
                if key in _NAMED_SCHEMAS and isinstance(value, dict)
                else _enforceable(value)
                for key, value in kept.items()
            }
        case list():
            return [_enforceable(inner) for inner in schema]
        case _:
            return schema
