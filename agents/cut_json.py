"""Completes a JSON text that was cut off, so that what a model wrote before its limit is not lost."""

import re

from pydantic_core import from_json, to_json

_CUT_NUMBER = re.compile(r"[-+.\deE]+\s*\Z")


def closed(text: str) -> str:
    """Return the JSON text of the values that are whole in the beginning of one. Lists and objects end after them.

    The value in which the text ends is left out, even if it could be whole: 269 may be the beginning of 26905. A text
    that is whole, or not the beginning of a JSON value, is returned unchanged.
    """
    try:
        from_json(text)
    except ValueError:
        try:
            return to_json(from_json(_CUT_NUMBER.sub("", text), allow_partial=True)).decode()
        except ValueError:
            return text
    return text
