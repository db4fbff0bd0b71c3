"""What a model reads of a call's result."""

import json
from collections.abc import Callable

import pytest

from runtime.tools.mcp.settings import McpSettings
from runtime.tools.tool import ToolError
from tests.runtime.tools.mcp.servers import raw, running, stub


async def test_other_content_than_text_is_named(settings: Callable[..., McpSettings]) -> None:
    async with running(settings()) as call:
        assert (await call("media")).splitlines() == [
            "first",
            "[image: image/png, 3 bytes, not shown]",
            "[audio: audio/wav, 3 bytes, not shown]",
            "[resource: file:///a.txt, unknown type, not shown]",
            "[resource: file:///b.txt, text/plain, not shown]",
            "last",
        ]
        assert json.loads(await call("table")) == {"rows": 2}


async def test_structured_content_is_returned_if_there_is_no_text() -> None:
    async with running(raw("image")) as call:
        assert await call("odd") == '{"ä": 1}\n[image: image/png, 3 bytes, not shown]'


async def test_long_output_is_cut() -> None:
    async with running(stub(output_max_bytes=301)) as call:
        assert await call("text", size=150) == "ä" * 150
        assert await call("text", size=1000) == "ä" * 150 + "\n... 1700 more bytes were cut"
    async with running(raw("fail", output_max_bytes=301)) as call:
        with pytest.raises(ToolError, match=r"^r{301}\n... 699 more bytes were cut$"):
            await call("odd")


async def test_failed_tool_raises_its_text(settings: Callable[..., McpSettings]) -> None:
    async with running(settings()) as call:
        with pytest.raises(ToolError, match="Error executing tool fail"):
            await call("fail", reason="the moon")
        with pytest.raises(ToolError, match="valid integer"):
            await call("add", a="x", b=1)
        assert await call("add", a=1, b=1) == "2"
