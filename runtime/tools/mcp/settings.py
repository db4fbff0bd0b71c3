"""The settings of an MCP server: how it is reached, what of it roles may use, and how long it may take."""

import re
from collections.abc import Mapping
from typing import Self
from urllib.parse import urlsplit

from pydantic import ByteSize, Field, SecretStr, field_validator, model_validator

from agents.role import Value

SERVER_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")
"""The pattern that the whole name of a server must match. The names of the server's tools begin with it."""


class McpSettings(Value):
    """The settings of one MCP server: how to reach it, and which tools to offer. Set either `command` or `url`."""

    command: str | None = Field(
        default=None,
        min_length=1,
        description="The program to start as the server. It talks over stdin and stdout.",
    )
    args: tuple[str, ...] = Field(default=(), description="The arguments of `command`.")
    env: Mapping[str, SecretStr] = Field(
        default_factory=dict,
        description="Environment variables of `command`, beside HOME, LOGNAME, PATH, SHELL, TERM and USER. "
        "It inherits no others, so put what it needs here.",
    )
    url: str | None = Field(default=None, description="The address of a server that talks streamable HTTP.")
    token_file: str | None = Field(
        default=None,
        description="A file with the bearer token for `url`. A relative path starts at the folder of the "
        "configuration. It is read at each connection.",
    )
    tools: tuple[str, ...] | None = Field(
        default=None, description="The tools to offer, by the server's names for them; all if unset."
    )
    idempotent: tuple[str, ...] = Field(
        default=(),
        description="The tools that may run again after a crash, by the server's names for them. "
        "Troupe ignores what the server says about this.",
    )
    output_max_bytes: ByteSize = Field(
        default=ByteSize(8192), ge=256, le=1 << 20, description="The most output of a call that the model reads."
    )
    timeout_s: float = Field(default=30, gt=0, le=86400, description="The time that one call may take, in seconds.")
    start_timeout_s: float = Field(
        default=30,
        gt=0,
        le=3600,
        description="The time that the server may take to start and to list its tools, in seconds. "
        "A call that finds the server gone may take this long in addition.",
    )

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url is None:
            return url
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must start with http:// or https:// and name a host")
        if "@" in parts.netloc:
            raise ValueError("must not hold a password; put a token into a file and set `token_file`")
        return url

    @model_validator(mode="after")
    def _check_transport(self) -> Self:
        if (self.command is None) == (self.url is None):
            raise ValueError("set exactly one of `command` and `url`")
        if self.command is None and (self.args or self.env):
            raise ValueError("`args` and `env` belong to `command`; remove them or set `command` in place of `url`")
        if self.url is None and self.token_file is not None:
            raise ValueError("`token_file` belongs to `url`; remove it or set `url` in place of `command`")
        return self
