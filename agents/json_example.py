"""Makes an example of what a JSON schema allows, to check roles with and for modelled engines."""

from collections.abc import Mapping
from typing import Any


def example(schema: Mapping[str, Any]) -> Any:
    """Return a simple value that fits a schema as pydantic and YAML roles write it.

    The value may not fit a schema with patterns, `allOf` and the like. Raise KeyError for a dangling reference, and
    RecursionError for a schema that contains itself.
    """
    return _example(schema, schema.get("$defs", {}))


def _example(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Any:
    match schema:
        case {"$ref": str(place)}:
            return _example(definitions[place.removeprefix("#/$defs/")], definitions)
        case {"anyOf": [first, *_]}:
            return _example(first, definitions)
        case {"const": value} | {"enum": [value, *_]}:
            return value
        case {"type": "object"}:
            fields = schema.get("properties", {})
            return {key: _example(fields.get(key, {}), definitions) for key in schema.get("required", fields)}
        case {"type": "array"}:
            return [_example(schema.get("items", {}), definitions)] * max(1, schema.get("minItems", 1))
        case {"type": "integer" | "number"}:
            return schema.get("minimum", 1)
        case {"type": "boolean"}:
            return True
        case _:
            return "1" * max(1, schema.get("minLength", 1))
