"""The interface between a job and its tools: an object that runs one tool and limits what the tool may do."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Self

from agents.tool import ToolSpec
from runtime.errors import TroupeError


class ToolError(TroupeError):
    """A tool call failed. The message says why. The model reads the message in place of the output."""


class Tool(ABC):
    """An async context manager that runs one tool.

    Entering it starts what the tool needs. Leaving it ends every process. Calls may overlap. Every call ends within the
    tool's time limit. A cancelled call ends the processes that it started.
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
"""An entry of the configuration's `tools`: one tool, or a server of several. Entering it may raise ToolError."""
