"""Owns the stored form of a tool's call, so that an interrupted job does not repeat a finished one."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from agents.tool_protocol import ToolCall, ToolUse
from agents.workflow import Entry
from runtime.engines.usage import Usage


@dataclass(frozen=True)
class ToolRecord:
    """A call of a tool while a seat worked on the workflow's call `number`.

    `used` is what the seat used to ask for it. `use` is None until the tool has returned.
    """

    number: int
    seat: str
    call: ToolCall
    used: Usage
    use: ToolUse | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the call as JSON for the journal, without what came of it."""
        return {"number": self.number, "seat": self.seat, **asdict(self.call), "used": asdict(self.used)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the record that `as_json` wrote. Raises KeyError or TypeError for anything else."""
        call = ToolCall(data["tool"], data["arguments"], data["text"])
        return cls(data["number"], data["seat"], call, Usage(**data["used"]))


def tool_entry(seat: str, use: ToolUse) -> Entry:
    """Return the line of the transcript for a call of a tool."""
    return Entry(seat, str(use.call), use.output, "failed" if use.failed else None)
