"""Tools by name: what a configuration can name, and what is wrong with it."""

from pathlib import Path
from typing import Any

import pytest

from agents.tool_protocol import ToolCall
from runtime.errors import ConfigError, PluginError, TroupeError
from runtime.tools import catalogue
from runtime.tools.mcp.settings import McpSettings
from runtime.tools.toolbox import Toolbox
from tests.plugins import lay_out
from tests.runtime.tools.function import functions

HERE = functions.__name__


def make(name: str, function: str | None = None, **options: Any) -> Any:
    return catalogue.make(name, function, None, options)


async def test_function_is_a_tool() -> None:
    async with Toolbox({"long": make("long", f"{HERE}:long", timeout_s=60, output_max_bytes="64B")}) as toolbox:
        [spec] = toolbox.specs(["long"])
        assert spec.name == "long"
        use = await toolbox.use(ToolCall("long", {"size": 3}, ""))
        assert (use.output, use.failed) == ("ééé", False)
        assert not toolbox.may_repeat("long")


async def test_registered_python_tool_runs_code() -> None:
    async with Toolbox({"python": make("python", memory_bytes="128MiB")}) as toolbox:
        use = await toolbox.use(ToolCall("python", {"code": "print(2**64)"}, ""))
        assert use.output == "18446744073709551616"
        assert toolbox.may_repeat("python")


async def test_function_of_a_package_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = 'def shout(text: str) -> str:\n    """Say it louder."""\n    return text.upper()\n'
    lay_out(tmp_path, "shout-kit", {"troupe.tools": {"shout": "shout_kit:shout"}}, {"shout_kit": source})
    monkeypatch.syspath_prepend(tmp_path)
    async with Toolbox({"shout": make("shout")}) as toolbox:
        assert (await toolbox.use(ToolCall("shout", {"text": "hello"}, ""))).output == "HELLO"


@pytest.mark.parametrize(
    ("name", "function", "options", "error", "message"),
    [
        ("pyton", None, {}, ConfigError, "tools.pyton: no tool is named 'pyton'; did you mean python"),
        (
            "python",
            None,
            {"timeout": 3},
            ConfigError,
            "tools.python.timeout: extra inputs are not permitted; known keys",
        ),
        ("python", None, {"memory_bytes": "lots"}, ConfigError, "tools.python.memory_bytes"),
        ("mine", f"{HERE}:long", {"timeout_s": 0}, ConfigError, "tools.mine.timeout_s"),
        (
            "mine",
            "nowhere_at:all",
            {},
            PluginError,
            "tools.mine: tool 'nowhere_at:all' of this configuration cannot be",
        ),
        ("mine", f"{HERE}:nothing", {}, PluginError, "has no attribute 'nothing'"),
        ("mine", "json:JSONDecoder", {}, PluginError, "is not a function"),
        ("mine", "json:loads", {}, PluginError, "the parameter s has no type"),
    ],
)
def test_fault_names_the_key(
    name: str, function: str | None, options: dict[str, Any], error: type[TroupeError], message: str
) -> None:
    with pytest.raises(error) as raised:
        make(name, function, **options)
    assert message in str(raised.value)


async def test_server_that_does_not_start_is_a_fault_of_its_key() -> None:
    server = catalogue.make("docs", None, McpSettings(command="no-such-program"), {})
    with pytest.raises(ConfigError, match=r"tools\.docs: .*no-such-program"):
        await Toolbox({"docs": server}).__aenter__()


async def test_two_tools_of_one_name_are_refused() -> None:
    sources = {"long": make("long", f"{HERE}:long"), "other": make("long", f"{HERE}:long")}
    with pytest.raises(ConfigError, match=r"tools\.other: another tool is named long already"):
        await Toolbox(sources).__aenter__()
