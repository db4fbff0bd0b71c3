"""The seam between the MCP client and the ways to reach a server."""

from abc import ABC, abstractmethod
from typing import Any

MESSAGE_MAX_BYTES = 16 << 20
"""A server that sends a longer message loses its connection (stdio), or the call fails (HTTP)."""


class Transport(ABC):
    """An async context manager that connects the client to a server and gives the client its two streams."""

    def __init__(self) -> None:
        self.lost: str | None = None

    def lose(self, reason: str) -> None:
        """Note that no further call can be made. The first reason is kept."""
        self.lost = self.lost or reason

    @abstractmethod
    async def __aenter__(self) -> tuple[Any, Any]: ...

    @abstractmethod
    async def __aexit__(self, *exc: object) -> None: ...

    @abstractmethod
    def advice(self) -> str:
        """Return what a user can do about a server that does not start."""
