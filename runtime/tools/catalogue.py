"""Creates the tools that a configuration names: functions, registered tools, and MCP servers."""

import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from agents import registry
from agents.role import Value, explain
from agents.tool import NotATool, spec_of
from runtime.errors import ConfigError, PluginError
from runtime.tools.function.function_tool import FunctionTool
from runtime.tools.mcp.settings import McpSettings
from runtime.tools.tool import Tool, ToolSource


def make(name: str, function: str | None, mcp: McpSettings | None, options: Mapping[str, Any]) -> ToolSource:
    """Return a source of tools: an MCP server, a function given as module:function, or the tool registered as `name`.

    Raise ConfigError if the name or an option is wrong, and PluginError if a third party's tool is broken. Errors name
    the key below `tools.<name>`.
    """
    place = f"tools.{name}"
    if mcp is not None:
        from runtime.tools.mcp.server import McpServer  # the import takes half a second, and few configurations need it

        _options(place, Value, options)
        return McpServer(name, mcp)
    entry = _entry(place, name, function)
    target = _load(place, entry)
    if isinstance(target, type) and issubclass(target, Tool):
        return _alone(_tool_object(place, target, options))
    try:
        spec = spec_of(name, target)
    except NotATool as error:
        raise PluginError(f"{place}: {entry.broken(str(error))}") from None
    return _alone(FunctionTool(spec, entry.target, _options(place, FunctionTool.Options, options)))


def _entry(place: str, name: str, function: str | None) -> registry.Registered:
    if function is not None:
        return registry.Registered(function, "tool", "this configuration", _importable(function))
    try:
        return registry.find("tool", name)
    except registry.UnknownName as error:
        raise ConfigError(f"{place}: {error}; or name a `function` or an `mcp` server") from None
    except registry.BrokenPlugin as error:
        raise PluginError(f"{place}: {error}") from None


def _importable(function: str) -> str:
    """Return a function as module:function. For file.py:function, add its folder to `sys.path`, which workers copy."""
    path, is_file, name = function.partition(".py:")
    if not is_file:
        return function
    folder = str(Path(path).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    return f"{Path(path).name}:{name}"


def _load(place: str, entry: registry.Registered) -> object:
    try:
        return entry.load_object()
    except registry.BrokenPlugin as error:
        raise PluginError(f"{place}: {error}") from None


def _tool_object(place: str, tool: type[Tool], options: Mapping[str, Any]) -> Tool:
    chosen = _options(place, getattr(tool, "Options", Value), options)
    try:
        return tool(chosen)  # type: ignore[call-arg]  # registered tools take their options
    except Exception as error:  # a third party's tool may raise anything
        raise PluginError(f"{place}: {tool.__name__}() raised {error!r}") from error


def _options(place: str, model: type[BaseModel], options: Mapping[str, Any]) -> Any:
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        known = ", ".join(["function", "mcp", *model.model_fields])
        raise ConfigError(f"{place}.{explain(error, 'options')}; known keys are {known}") from None


@asynccontextmanager
async def _alone(tool: Tool) -> AsyncIterator[Sequence[Tool]]:
    async with tool:
        yield [tool]
