"""Owns the stored form of a tool call, so that a resumed job does not repeat a finished call."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from agents.tool_protocol import ToolCall, ToolUse
from agents.workflow import Entry, RoleCall
from runtime.engines.usage import Usage


@dataclass(frozen=True)
class ToolRecord:
    """A tool call that a seat's model made during the workflow's call `number`.

    `task` is the `task_id` of the workflow's call. `used` is the usage of the request in which the model made the tool
    call. `use` is None until the tool has returned.
    """

    number: int
    seat: str
    task: str
    call: ToolCall
    used: Usage
    use: ToolUse | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the tool call as JSON for the journal, without its output."""
        return {
            "number": self.number,
            "seat": self.seat,
            "task": self.task,
            **asdict(self.call),
            "used": asdict(self.used),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the record that `as_json` wrote. Raise KeyError or TypeError for other data."""
        call = ToolCall(data["tool"], data["arguments"], data["text"])
        return cls(data["number"], data["seat"], data["task"], call, Usage(**data["used"]))

    def belongs_to(self, call: RoleCall) -> bool:
        """Return True if the tool call was made during this call, and not during an earlier call with its number."""
        return (self.number, self.seat, self.task) == (call.number, call.seat, task_id(call))


def task_id(call: RoleCall) -> str:
    """Return a short identifier of a call's seat and task. It is the same for every try of the call."""
    return hashlib.blake2b(f"{call.seat}/{call.task!r}".encode(), digest_size=8).hexdigest()


def tool_entry(seat: str, use: ToolUse) -> Entry:
    """Return the transcript entry for a tool call."""
    return Entry(seat, str(use.call), use.output, "failed" if use.failed else None)
