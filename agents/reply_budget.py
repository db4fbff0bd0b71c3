"""Limits the tokens of a reply to a JSON schema, so that a model that never stops does not fill every string."""

import math
from collections.abc import Mapping
from typing import Any

CHARACTERS_PER_TOKEN = 3
"""English text has about 4 characters per token. A model that pads its strings writes fewer than 3."""
DENSE_CHARACTERS = 400
"""The number of characters that may take one token each, such as digits and the letters of some scripts."""
SPARE_TOKENS = 32
_NUMBER_CHARACTERS = 20
_PUNCTUATION_CHARACTERS = 6  # around a property: quotes, colon, comma, blanks


def tokens(schema: Mapping[str, Any]) -> int | None:
    """Return the tokens that ordinary text needs to fill the schema's strings and lists, or None if one is unbounded.

    The limits of a schema alone admit about three times as many tokens, because a token may be a single character.
    """
    try:
        characters = _characters(schema, schema.get("$defs", {}))
    except RecursionError:  # a schema that contains itself
        return None
    if characters is None:
        return None
    dense = min(characters, DENSE_CHARACTERS)
    return dense + math.ceil((characters - dense) / CHARACTERS_PER_TOKEN) + SPARE_TOKENS


def _characters(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> int | None:
    match schema:
        case {"$ref": str(place)}:
            return _characters(definitions[place.removeprefix("#/$defs/")], definitions)
        case {"const": value}:
            return len(str(value))
        case {"enum": values}:
            return max(len(str(value)) for value in values)
        case {"anyOf": forms}:
            parts = [_characters(form, definitions) for form in forms]
            return None if None in parts else max(part for part in parts if part is not None)
        case {"type": "null"}:
            return len("null")
        case {"type": "object", "properties": properties}:
            parts = [_characters(part, definitions) for part in properties.values()]
            names = sum(len(name) + _PUNCTUATION_CHARACTERS for name in properties)
            return None if None in parts else names + sum(part for part in parts if part is not None)
        case {"type": "array", "maxItems": int(items), "items": item}:
            each = _characters(item, definitions)
            return None if each is None else items * (each + _PUNCTUATION_CHARACTERS)
        case {"type": "string", "maxLength": int(length)}:
            return length
        case {"type": "integer" | "number" | "boolean"}:
            return _NUMBER_CHARACTERS
        case _:
            return None
