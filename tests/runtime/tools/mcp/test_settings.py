"""The settings of an MCP server: which are refused."""

from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from runtime.tools.mcp.settings import McpSettings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of `command` and `url`"),
        ({"command": "a", "url": "http://h"}, "exactly one of `command` and `url`"),
        ({"url": "http://h", "args": ("a",)}, "`args` and `env` belong to `command`"),
        ({"url": "http://h", "env": {"A": "b"}}, "`args` and `env` belong to `command`"),
        ({"command": "a", "token_file": "t"}, "`token_file` belongs to `url`"),
        ({"url": "ftp://h"}, "url\n.*must start with http"),
        ({"url": "http://user:secret@h"}, "url\n.*`token_file`"),
        ({"command": "a", "timeout_s": 0}, "timeout_s"),
        ({"command": "a", "nonsense": 0}, "nonsense"),
    ],
)
def test_wrong_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        McpSettings(**fields)


def test_settings_do_not_show_the_environment() -> None:
    assert "secret" not in repr(McpSettings(command="a", env={"KEY": SecretStr("secret")}))
