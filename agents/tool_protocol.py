"""How a role's model calls tools: as JSON that a grammar enforces, so any chat model can, without a parser of its own.

While tools are offered, the model replies with one object of two forms:

    {"tool": "python", "arguments": {"code": "print(2**64)"}}
    {"reply": ...}                          # what the role's schema asks for, or a text

The schema of a request admits nothing else. Models with a native form of tool calls get the same; `troupe serve` speaks
the native forms to clients that bring their own tools.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agents.role import Message, ReplyUnusable, read_json
from agents.tool import ToolSpec

_OFFER = """You may use tools. Reply with one JSON object: either a call of a tool,
{{"tool": "<name>", "arguments": {{...}}}}, whose output you are then given, or your reply, {{"reply": {reply}}}.
The tools:
{tools}"""
_LAST = 'You have used all your calls of tools. Reply now: {"reply": ...}'


@dataclass(frozen=True)
class ToolCall:
    """A model's call of a tool. `text` is the whole message with which the model made it."""

    tool: str
    arguments: Mapping[str, Any]
    text: str

    def __str__(self) -> str:
        return f"{self.tool} {json.dumps(self.arguments, ensure_ascii=False)}"


@dataclass(frozen=True)
class ToolUse:
    """A finished call of a tool: its output, or the error if it `failed`."""

    call: ToolCall
    output: str
    failed: bool = False


def messages(chat: Sequence[Message], tools: Sequence[ToolSpec], past: Sequence[ToolUse], left: int) -> list[Message]:
    """Return a role's chat with the offer of tools, the calls so far and their outputs.

    `left` is how many more calls the model may make.
    """
    listed = "\n".join(
        f"- {tool.name}: {tool.description}\n  arguments: {json.dumps(dict(tool.parameters), ensure_ascii=False)}"
        for tool in tools
    )
    offer = _OFFER.format(reply="what you are asked for", tools=listed)
    system = [message for message in chat if message.role == "system"]
    others = [message for message in chat if message.role != "system"]
    texts = [*(message.content for message in system), offer]
    extended = [Message("system", "\n\n".join(texts)), *others]
    for use in past:
        heading = f"{use.call.tool} failed" if use.failed else f"Output of {use.call.tool}"
        extended += [Message("assistant", use.call.text), Message("user", f"{heading}:\n{use.output}")]
    if past and not left:
        last = extended.pop()
        extended.append(Message("user", f"{last.content}\n\n{_LAST}"))
    return extended


def schema(tools: Sequence[ToolSpec], reply: Mapping[str, Any] | None, left: int) -> dict[str, Any]:
    """Return the JSON schema of a call of one of the tools, if `left` is not 0, or of a reply."""
    definitions: dict[str, Any] = {}
    reply_form = _hoisted(reply, "reply", definitions) if reply is not None else {"type": "string", "minLength": 1}
    forms = [_object({"reply": reply_form})]
    if left:
        forms += [
            _object({"tool": {"const": tool.name}, "arguments": _hoisted(tool.parameters, tool.name, definitions)})
            for tool in tools
        ]
    whole = {"anyOf": forms} if len(forms) > 1 else forms[0]
    return {**whole, "$defs": definitions} if definitions else whole


def read(text: str) -> ToolCall | str:
    """Return the call in a model's text, or the text of its reply. Raise ReplyUnusable if it is neither."""
    match read_json(text):
        case {"tool": str(tool), "arguments": dict(arguments)}:
            return ToolCall(tool, arguments, text)
        case {"reply": str(reply)}:
            return reply
        case {"reply": reply}:
            return json.dumps(reply, ensure_ascii=False)
        case _:
            raise ReplyUnusable('neither a call of a tool, {"tool": ..., "arguments": ...}, nor {"reply": ...}')


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _hoisted(part: Mapping[str, Any], prefix: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return a schema that can stand inside another. Its definitions move to `definitions`, with a prefix."""

    def renamed(value: Any) -> Any:
        match value:
            case {"$ref": str(place), **others} if place.startswith("#/$defs/"):
                return {**others, "$ref": f"#/$defs/{prefix}.{place.removeprefix('#/$defs/')}"}
            case dict():
                return {key: renamed(inner) for key, inner in value.items()}
            case list():
                return [renamed(inner) for inner in value]
            case _:
                return value

    for name, definition in part.get("$defs", {}).items():
        definitions[f"{prefix}.{name}"] = renamed(definition)
    return {key: renamed(value) for key, value in part.items() if key != "$defs"}
