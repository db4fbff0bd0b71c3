"""Reads a JSON text that was cut off, so that a role can use what a model wrote before its token limit."""

import re
from typing import Any

from pydantic_core import from_json, to_json

_CUT_NUMBER = re.compile(r"[-+.\deE]+\s*\Z")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"?', re.DOTALL)
_ESCAPED = {code: f"\\u{code:04x}" for code in range(32)}


def closed(text: str) -> str:
    """Return a JSON text that was cut off as valid JSON: keep the complete values and close lists and objects.

    Leave out the value in which the text ends, even if it looks complete: 269 may be the beginning of 26905. Return the
    text unchanged if it is complete, or if it is not the beginning of a JSON value.
    """
    strict = _without_control_characters(text)
    try:
        from_json(strict)
    except ValueError:
        try:
            return to_json(from_json(_CUT_NUMBER.sub("", strict), allow_partial=True)).decode()
        except ValueError:
            return text
    return text


def beginning(text: str) -> Any:
    """Return the JSON value that a text begins, or None if it is not JSON. Keep a string that is cut off."""
    try:
        return from_json(_without_control_characters(text), allow_partial="trailing-strings")
    except ValueError:
        return None


def _without_control_characters(text: str) -> str:
    """Escape control characters in strings, because a grammar that limits a string's length does not exclude them."""
    return _STRING.sub(lambda string: string[0].translate(_ESCAPED), text)
