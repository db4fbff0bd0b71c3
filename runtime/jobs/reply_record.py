"""Owns the stored form of a seat's reply, from which an interrupted job resumes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from pydantic import ValidationError

from agents.role import Reply, Task
from agents.workflow import RoleCall, Unusable
from runtime.engines.usage import Usage
from runtime.events import RoleReplied
from runtime.jobs.tool_record import ToolRecord


@dataclass(frozen=True)
class ReplyRecord:
    """The reply to the call `number` of a workflow, and the usage of the request for it.

    If the reply ended early, `note` says why. `tools` holds the tool calls before the reply. Their usage is
    not part of `used`.
    """

    number: int
    seat: str
    reply: Reply | Unusable
    used: Usage
    note: str = ""
    tools: tuple[ToolRecord, ...] = ()

    @classmethod
    def of(cls, event: RoleReplied) -> Self:
        """Return the record of a reply, without its tool calls, which have their own records."""
        return cls(event.number, event.seat, event.reply, event.usage, event.note)

    def as_json(self) -> dict[str, Any]:
        """Return the record as JSON for the journal, without `tools`."""
        reply = self.reply
        content = {"why": reply.why} if isinstance(reply, Unusable) else reply.model_dump(mode="json")
        return {
            "number": self.number,
            "seat": self.seat,
            "reply": {"kind": type(reply).__name__, **content},
            "used": asdict(self.used),
            **({"note": self.note} if self.note else {}),
        }


@dataclass(frozen=True)
class StoredReply:
    """A reply as stored in the journal. Its type is unknown until the workflow makes the call that it answers.

    `kind` is the name of the reply's type, and `fields` holds the reply's fields. The other attributes are those of
    ReplyRecord.
    """

    number: int
    seat: str
    kind: str
    fields: Mapping[str, Any]
    used: Usage
    note: str = ""
    tools: tuple[ToolRecord, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the reply that `ReplyRecord.as_json` wrote. Raise KeyError or TypeError for other data."""
        fields = dict(data["reply"])
        kind = fields.pop("kind")
        return cls(data["number"], data["seat"], kind, fields, Usage(**data["used"]), data.get("note", ""))

    def to(self, call: RoleCall) -> ReplyRecord | None:
        """Return this reply as the record of a call, or None if the reply does not fit the call's seat or task."""
        reply = self._typed(call.task)
        if self.seat != call.seat or reply is None:
            return None
        return ReplyRecord(self.number, self.seat, reply, self.used, self.note, self.tools)

    def _typed(self, task: Task) -> Reply | Unusable | None:
        try:
            if self.kind == Unusable.__name__:
                return Unusable(**self.fields)
            return task.reply_type.model_validate(self.fields) if self.kind == task.reply_type.__name__ else None
        except (ValidationError, TypeError):
            return None
