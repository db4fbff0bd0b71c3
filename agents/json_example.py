"""Makes a value that fits a JSON schema, for the check of roles and for modelled engines."""

from collections.abc import Mapping
from typing import Any


def example(schema: Mapping[str, Any], character: str = "1") -> Any:
    """Return a simple value that fits a schema of a pydantic model or a YAML role. Strings consist of `character`.

    The value may not fit a schema with keywords such as `pattern` and `allOf`. Raise KeyError for a dangling reference,
    and RecursionError for a schema that contains itself.
    """
    return _example(schema, schema.get("$defs", {}), character)


def _example(schema: Mapping[str, Any], definitions: Mapping[str, Any], character: str) -> Any:
    match schema:
        case {"$ref": str(place)}:
            return _example(definitions[place.removeprefix("#/$defs/")], definitions, character)
        case {"anyOf": [first, *_]}:
            return _example(first, definitions, character)
        case {"const": value} | {"enum": [value, *_]}:
            return value
        case {"type": "object"}:
            fields = schema.get("properties", {})
            return {
                key: _example(fields.get(key, {}), definitions, character) for key in schema.get("required", fields)
            }
        case {"type": "array"}:
            return [_example(schema.get("items", {}), definitions, character)] * max(1, schema.get("minItems", 1))
        case {"type": "integer" | "number"}:
            return schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
        case {"type": "boolean"}:
            return True
        case _:
            return character * max(1, schema.get("minLength", 1))
