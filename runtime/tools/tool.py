"""The seam between a job and the tools that it calls: an object that runs one tool and bounds what it may do."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Self

from agents.tool import ToolSpec
from runtime.errors import TroupeError


class ToolError(TroupeError):
    """A call of a tool failed. The message says why; the model reads it in place of the output."""


class Tool(ABC):
    """An async context manager that runs one tool. Entering it starts what it needs; leaving it ends every process.

    Calls may overlap. A call ends in time, whatever the tool does, and cancelling it ends what it started.
    """

    spec: ToolSpec

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return

    @abstractmethod
    async def call(self, arguments: Mapping[str, Any]) -> str:
        """Run the tool with arguments that fit its schema, and return its output as text.

        Raise ToolError if the tool fails, takes too long, or cannot be reached.
        """


ToolSource = AbstractAsyncContextManager[Sequence[Tool]]
"""What a configuration calls a tool: it starts one tool, or a server of several. Entering it may raise ToolError."""
