"""Calls of tools as JSON: the offer, the schema, and what models reply."""

import enum
import json
from typing import Any

import pytest
import xgrammar
from jsonschema import Draft202012Validator
from pydantic import BaseModel
from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

from agents import tool_protocol
from agents.role import Message, ReplyUnusable
from agents.tool import NotATool, ToolSpec, spec_of, tool
from agents.tool_protocol import ToolCall, ToolUse


class Unit(enum.Enum):
    METRE = "m"
    FOOT = "ft"


class Length(BaseModel):
    value: float
    unit: Unit


def convert(length: Length, to: Unit = Unit.METRE) -> str:
    """Convert a length."""
    return f"{length.value} {to.value}"


CONVERT = spec_of("convert", convert)
PYTHON = ToolSpec("python", "Run a program.", {"type": "object", "properties": {"code": {"type": "string"}}})
REPLY: dict[str, Any] = {
    "type": "object",
    "properties": {"unit": {"$ref": "#/$defs/Unit"}},
    "required": ["unit"],
    "$defs": {"Unit": {"enum": ["mine"]}},
}


def fits(value: object, left: int = 1, reply: dict[str, Any] | None = REPLY) -> bool:
    schema = tool_protocol.schema([CONVERT, PYTHON], reply, left)
    Draft202012Validator.check_schema(schema)
    return bool(Draft202012Validator(schema).is_valid(value))


def test_schema_admits_calls_of_the_tools_and_replies_only() -> None:
    assert fits({"tool": "convert", "arguments": {"length": {"value": 1, "unit": "ft"}, "to": "m"}})
    assert not fits({"tool": "convert", "arguments": {"length": {"value": 1, "unit": "mine"}}})
    assert fits({"tool": "python", "arguments": {"code": "1"}})
    assert not fits({"tool": "shell", "arguments": {}})
    assert fits({"reply": {"unit": "mine"}})
    assert not fits({"reply": {"unit": "ft"}})
    assert fits({"reply": "text"}, reply=None)
    assert not fits({"reply": ""}, reply=None)


def test_schema_admits_only_a_reply_once_all_calls_are_used() -> None:
    assert not fits({"tool": "python", "arguments": {}}, left=0)
    assert fits({"reply": {"unit": "mine"}}, left=0)


def test_chat_has_the_offer_and_the_calls_so_far() -> None:
    chat = [Message("system", "You are a coder."), Message("user", "2**64?")]
    call = ToolCall("python", {"code": "print(2**64)"}, '{"tool": "python"}')
    first = tool_protocol.messages(chat, [PYTHON], [], 2)
    assert [message.role for message in first] == ["system", "user"]
    assert first[0].content.startswith("You are a coder.")
    assert "- python: Run a program." in first[0].content
    second = tool_protocol.messages(chat, [PYTHON], [ToolUse(call, "18446744073709551616")], 1)
    assert second[2:] == [Message("assistant", call.text), Message("user", "Output of python:\n18446744073709551616")]
    last = tool_protocol.messages(chat, [PYTHON], [ToolUse(call, "no memory", failed=True)], 0)
    assert last[-1].content.startswith("python failed:\nno memory\n\nYou have used all")


@pytest.mark.parametrize("pointer", ["#", "#/properties/value", "#/definitions/Unit", "#/$defs/Unit"])
def test_references_of_a_tool_s_schema_stay_within_it(pointer: str) -> None:
    parameters = {
        "type": "object",
        "properties": {"value": {"type": "integer"}, "more": {"$ref": pointer}},
        "additionalProperties": False,
        "definitions": {"Unit": {"type": "integer"}},
        "$defs": {"Unit": {"type": "integer"}},
    }
    schema = tool_protocol.schema([ToolSpec("reply", "A name of ours.", parameters)], REPLY, 1)
    xgrammar.Grammar.from_json_schema(json.dumps(schema))
    right = {"value": 1} if pointer == "#" else 1
    is_valid = Draft202012Validator(schema).is_valid
    assert is_valid({"tool": "reply", "arguments": {"more": right}})
    assert not is_valid({"tool": "reply", "arguments": {"more": "text"}})
    assert is_valid({"reply": {"unit": "mine"}})


def test_keywords_that_grammars_lack_are_left_to_the_runtime() -> None:
    text = {"type": "string", "format": "uri", "pattern": "^h", "maxLength": 9}
    parameters = {
        "type": "object",
        "properties": {"format": text, "some": {"type": "array", "items": text, "uniqueItems": True}},
        "required": ["format"],
        "propertyNames": {"pattern": "^[a-z]+$", "maxLength": 9},
    }
    schema = tool_protocol.schema([ToolSpec("fetch", "Fetch a page.", parameters)], REPLY, 1)
    assert not has_xgrammar_unsupported_json_features(schema)
    left = {"type": "string", "pattern": "^h"}
    assert schema["$defs"]["tool0"]["properties"] == {"format": left, "some": {"type": "array", "items": left}}
    assert has_xgrammar_unsupported_json_features(parameters)


def test_examples_of_a_chat_become_replies_of_the_protocol() -> None:
    chat = [
        Message("user", "1+1="),
        Message("assistant", '{"answer": "2"}'),
        Message("user", "name it"),
        Message("assistant", "two"),
        Message("user", "2+2="),
    ]
    shown = tool_protocol.messages(chat, [PYTHON], [], 1)
    assert [m.content for m in shown if m.role == "assistant"] == ['{"reply": {"answer": "2"}}', '{"reply": "two"}']


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ('{"reply": "a long text that', "a long text that"),
        ('{"reply": {"result": "19", "work": "12+', '{"result": "19"}'),
        ('{"reply": "whole"}', "whole"),
    ],
)
def test_reply_that_ended_early_keeps_what_is_whole(text: str, reply: str) -> None:
    assert tool_protocol.read(text, ended_early=True) == reply


@pytest.mark.parametrize(
    "text",
    [
        '{"tool": "python", "arguments": {"code": "1", "more": [1, 2',
        '{"tool": "py',
        "{",
        "",
        '{"reply": "',
        "[" * 10**5,
    ],
)
def test_call_that_ended_early_is_not_made(text: str) -> None:
    with pytest.raises(ReplyUnusable, match="incomplete"):
        tool_protocol.read(text, ended_early=True)


def test_replies_are_read() -> None:
    text = '{"tool": "python", "arguments": {"code": "1"}}'
    assert tool_protocol.read(text) == ToolCall("python", {"code": "1"}, text)
    assert tool_protocol.read('{"reply": "hello"}') == "hello"
    assert json.loads(str(tool_protocol.read('{"reply": {"unit": "mine"}}'))) == {"unit": "mine"}


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", '{"tool": 3, "arguments": {}}', '{"tool": "python"}', '{"answer": 1}'),
        r'{"tool": "python", "arguments": {"code": "\ud83d"}}',
    ],
)
def test_anything_else_is_unusable(text: str) -> None:
    with pytest.raises(ReplyUnusable):
        tool_protocol.read(text)


def test_function_gives_its_docstring_and_its_types() -> None:
    @tool(idempotent=True)
    def add(a: int, b: int = 2) -> int:
        """Add two numbers."""
        return a + b

    spec = spec_of("add", add)
    assert (spec.name, spec.description, spec.idempotent) == ("add", "Add two numbers.", True)
    assert spec.parameters["required"] == ["a"]
    assert spec.parameters["additionalProperties"] is False
    assert not CONVERT.idempotent


def without_docstring(a: int) -> int:
    return a


def without_type(a) -> int:  # type: ignore[no-untyped-def]  # the fault
    """Lack a type."""
    return int(a)


def with_stars(*values: int) -> int:
    """Take any number of values."""
    return sum(values)


def with_a_socket(connection: memoryview) -> int:
    """Take what JSON cannot hold."""
    return len(connection)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (without_docstring, "has no docstring"),
        (without_type, "the parameter a has no type"),
        (with_stars, "must be an ordinary, named one"),
        (with_a_socket, "cannot be written as JSON"),
        (Length, "is not a function"),
        (3, "is not a function"),
    ],
)
def test_object_that_cannot_be_a_tool_is_refused(function: object, why: str) -> None:
    with pytest.raises(NotATool, match=why):
        spec_of("mine", function)
