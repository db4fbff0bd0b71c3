"""The tools of a service by name: their specifications, and checked calls of them."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Self

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from agents.names import nearest
from agents.tool import ToolSpec
from agents.tool_protocol import ToolCall, ToolUse
from runtime.errors import ConfigError, PluginError
from runtime.tools.tool import Tool, ToolError, ToolSource


class Toolbox:
    """An async context manager over the tools that a configuration names. A name can provide several tools.

    Entering it starts every source of tools. It raises ConfigError if a source cannot start.
    """

    def __init__(self, sources: Mapping[str, ToolSource] | None = None) -> None:
        self._sources = sources or {}
        self._tools: dict[str, Tool] = {}
        self._names: dict[str, tuple[str, ...]] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            for name, source in self._sources.items():
                await self._enter(name, source)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def _enter(self, name: str, source: ToolSource) -> None:
        try:
            tools = await self._stack.enter_async_context(source)
        except ToolError as error:
            raise ConfigError(f"tools.{name}: {error}") from error
        for tool in tools:
            if tool.spec.name in self._tools:
                raise ConfigError(f"tools.{name}: another tool is named {tool.spec.name} already; rename one of them")
            self._tools[tool.spec.name] = tool
        self._names[name] = tuple(tool.spec.name for tool in tools)

    def specs(self, names: Sequence[str]) -> tuple[ToolSpec, ...]:
        """Return the specifications of the tools that a seat names. Raise PluginError if one was not started."""
        for name in names:
            if name not in self._names:
                raise PluginError(f"the tool {name!r} was not started with the team")
        return tuple(self._tools[tool].spec for name in names for tool in self._names[name])

    def may_repeat(self, tool: str) -> bool:
        """Return True if the tool is idempotent, so that a call that a crash interrupted may be repeated."""
        return tool in self._tools and self._tools[tool].spec.idempotent

    async def use(self, call: ToolCall) -> ToolUse:
        """Make a tool call. If the call is invalid or the tool fails, return a failed use whose output says why."""
        try:
            return ToolUse(call, (await self._tool(call).call(call.arguments)).rstrip("\n"))
        except ToolError as error:
            return ToolUse(call, str(error), failed=True)
        except Exception as error:  # a defect of a tool fails this call only
            logging.getLogger(__name__).exception("tool %s", call.tool)
            return ToolUse(call, f"an internal error: {error!r}", failed=True)

    def _tool(self, call: ToolCall) -> Tool:
        tool = self._tools.get(call.tool)
        if tool is None:
            raise ToolError(f"no tool is named {call.tool!r}; {nearest(call.tool, self._tools)}")
        schema = dict(tool.spec.parameters)
        # Without a registry, jsonschema would fetch what the schema refers to.
        validator = validator_for(schema, default=Draft202012Validator)(schema, registry=Registry())
        try:
            fault = best_match(validator.iter_errors(dict(call.arguments)))
        except Unresolvable as error:
            raise ToolError(f"its arguments cannot be checked: the schema refers to {error.ref}, outside it") from None
        if fault is not None:
            raise ToolError(f"{fault.json_path.replace('$', 'arguments', 1)}: {fault.message}")
        return tool
