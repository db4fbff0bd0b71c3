"""Reads a JSON text that was cut off, so that what a model wrote before its limit is not lost."""

import re
from typing import Any

from pydantic_core import from_json, to_json

_CUT_NUMBER = re.compile(r"[-+.\deE]+\s*\Z")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"?', re.DOTALL)
_ESCAPED = {code: f"\\u{code:04x}" for code in range(32)}


def closed(text: str) -> str:
    """Return the JSON text of the values that are whole in the beginning of one. Lists and objects end after them.

    The value in which the text ends is left out, even if it could be whole: 269 may be the beginning of 26905. A text
    that is whole, or not the beginning of a JSON value, is returned unchanged.
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
    """Return the JSON value that a text begins, or None for no JSON. A string in which it ends counts up to there."""
    try:
        return from_json(_without_control_characters(text), allow_partial="trailing-strings")
    except ValueError:
        return None


def _without_control_characters(text: str) -> str:
    """Escape control characters in strings: a grammar that limits a string's length does not exclude them."""
    return _STRING.sub(lambda string: string[0].translate(_ESCAPED), text)
