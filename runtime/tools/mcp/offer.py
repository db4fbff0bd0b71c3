"""The tools of a server that are offered to models, and their descriptions for models."""

import re
from collections import Counter
from collections.abc import Mapping

from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for
from mcp import types

from agents.tool import ToolSpec
from runtime.tools.bounded_output import cut
from runtime.tools.mcp.errors import REASON_MAX_CHARS, reason
from runtime.tools.mcp.settings import McpSettings
from runtime.tools.tool import ToolError

DESCRIPTION_MAX_BYTES = 8 << 10
TOOL_NAME_MAX_CHARS = 64


def offer(server: str, settings: McpSettings, tools: Mapping[str, types.Tool]) -> dict[str, ToolSpec]:
    """Return what models are told of the tools that the settings choose, by the server's names for them.

    Raise ToolError if a tool is missing or cannot be used.
    """
    chosen = list(tools) if settings.tools is None else list(dict.fromkeys(settings.tools))
    for field, names in (("tools", chosen), ("idempotent", settings.idempotent)):
        if missing := [name for name in names if name not in chosen or name not in tools]:
            raise ToolError(
                f"The MCP server {server} has no tool {missing[0]!r}, or it is not chosen; correct `{field}`. "
                f"The server's tools are {', '.join(tools)[:REASON_MAX_CHARS] or 'none'}."
            )
    specs = {name: _spec(server, tools[name], name in settings.idempotent) for name in chosen}
    for name, times in Counter(spec.name for spec in specs.values()).items():
        if times > 1:
            clashing = ", ".join(remote_name for remote_name, spec in specs.items() if spec.name == name)
            raise ToolError(
                f"The tools {clashing} of the MCP server {server} would all be named {name}; "
                "choose one of them with `tools`."
            )
    return specs


def _spec(server: str, tool: types.Tool, idempotent: bool) -> ToolSpec:
    """Return what a model is told about a tool. Raise ToolError if its name is too long or its schema is none."""
    name = f"{server}_{re.sub(r'[^A-Za-z0-9_-]', '_', tool.name)}"
    if len(name) > TOOL_NAME_MAX_CHARS:
        raise ToolError(
            f"The name {name[:200]} of a tool of the MCP server {server} has more than {TOOL_NAME_MAX_CHARS} "
            "characters; give the server a shorter name, or leave the tool out with `tools`."
        )
    schema = tool.input_schema
    try:
        validator_for(schema).check_schema(schema)
    except (SchemaError, TypeError) as error:  # TypeError: a `$schema` that is no text
        raise ToolError(
            f"The tool {tool.name} of the MCP server {server} has an invalid schema ({reason(error)[:200]}); "
            "leave the tool out with `tools`."
        ) from None
    description = tool.description or tool.title or tool.name
    return ToolSpec(name, cut(description, DESCRIPTION_MAX_BYTES), schema, idempotent)
