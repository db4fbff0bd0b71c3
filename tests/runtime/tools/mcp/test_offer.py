"""What a server offers, and what of it models are told."""

from collections.abc import Callable

import pytest

from runtime.tools.mcp.server import McpServer
from runtime.tools.mcp.settings import McpSettings
from runtime.tools.tool import ToolError
from tests.runtime.tools.mcp.servers import raw, running


async def test_tools_have_names_descriptions_and_schemas(settings: Callable[..., McpSettings]) -> None:
    async with McpServer("s", settings(tools=("add", "pid"), idempotent=("pid",))) as tools:
        assert [tool.spec.name for tool in tools] == ["s_add", "s_pid"]
        add = tools[0].spec
        assert add.description == "Add two numbers."
        assert add.parameters["required"] == ["a", "b"]
        assert add.parameters["properties"]["a"]["type"] == "integer"
        assert [tool.spec.idempotent for tool in tools] == [False, True]  # the server's hints do not count
        assert await tools[0].call({"a": 1, "b": 2}) == "3"


async def test_tools_of_all_pages_are_listed() -> None:
    async with McpServer("s", raw("")) as tools:
        assert [tool.spec.name for tool in tools] == ["s_echo", "s_odd", "s_other"]


@pytest.mark.parametrize("field", ["tools", "idempotent"])
async def test_unknown_tool_in_settings_is_refused(field: str) -> None:
    with pytest.raises(ToolError, match=rf"no tool 'nonsense'.*`{field}`.*echo, odd, other"):
        async with McpServer("s", raw("").model_copy(update={field: ("nonsense",)})):
            pass


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("clash", "oth/er, oth.er .* would all be named s_oth_er"),
        ("long name", "s_n{63} .* more than 64 characters"),
        ("schema", "oth.er .* invalid schema"),
    ],
)
async def test_unusable_tool_is_refused_unless_left_out(behaviour: str, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        async with McpServer("s", raw(behaviour)):
            pass
    async with running(raw(behaviour, tools=("echo",))) as call:
        assert await call("echo", value=1) == "1"


async def test_tool_names_fit_model_apis() -> None:
    async with McpServer("s", raw("name")) as tools:
        assert [tool.spec.name for tool in tools] == ["s_echo", "s_odd", "s_oth_er"]
        assert await tools[2].call({"value": "x"}) == '"x"'  # the server is called by its own name for the tool


@pytest.mark.parametrize("name", ["", "a b", "ä", "n" * 33])
def test_server_name_must_fit_tool_names(name: str) -> None:
    with pytest.raises(ValueError, match="name of an MCP server"):
        McpServer(name, raw(""))
