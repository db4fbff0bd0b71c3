"""Owns the stored form of a tool's call, so that an interrupted job does not repeat a finished one."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from agents.tool_protocol import ToolCall, ToolUse
from agents.workflow import Entry, RoleCall
from runtime.engines.usage import Usage


@dataclass(frozen=True)
class ToolRecord:
    """A call of a tool while a seat worked on the workflow's call `number`.

    `task` identifies the task of that call. `used` is what the seat used to ask for the tool. `use` is None until the
    tool has returned.
    """

    number: int
    seat: str
    task: str
    call: ToolCall
    used: Usage
    use: ToolUse | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the call as JSON for the journal, without its output."""
        return {
            "number": self.number,
            "seat": self.seat,
            "task": self.task,
            **asdict(self.call),
            "used": asdict(self.used),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the record that `as_json` wrote. Raises KeyError or TypeError for anything else."""
        call = ToolCall(data["tool"], data["arguments"], data["text"])
        return cls(data["number"], data["seat"], data["task"], call, Usage(**data["used"]))

    def belongs_to(self, call: RoleCall) -> bool:
        """Return True if the tool was called for this call, and not for another one that once had its number."""
        return (self.number, self.seat, self.task) == (call.number, call.seat, task_id(call))


def task_id(call: RoleCall) -> str:
    """Return a short text that is the same for every try of a call, and differs for another seat or task."""
    return hashlib.blake2b(f"{call.seat}/{call.task!r}".encode(), digest_size=8).hexdigest()


def tool_entry(seat: str, use: ToolUse) -> Entry:
    """Return the line of the transcript for a call of a tool."""
    return Entry(seat, str(use.call), use.output, "failed" if use.failed else None)
