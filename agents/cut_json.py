"""Completes a JSON text that was cut off, so that what a model wrote before its limit is not lost."""

from pydantic_core import from_json, to_json


def closed(text: str) -> str:
    """Return the JSON text that the beginning of one holds: open strings, lists and objects end where the text ends.

    Nothing is invented: a property whose value the model did not reach stays missing. A text that is whole, or not the
    beginning of a JSON value, is returned unchanged.
    """
    try:
        from_json(text)
    except ValueError:
        try:
            return to_json(from_json(text, allow_partial="trailing-strings")).decode()
        except ValueError:
            return text
    return text
