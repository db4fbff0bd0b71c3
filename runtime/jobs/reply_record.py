"""Owns the stored form of a seat's reply, from which an interrupted job resumes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from agents.role import Answer, Plan, Reply, Solution, Verdict
from agents.workflow import Unusable
from runtime.engines.usage import Usage
from runtime.events import RoleReplied

_REPLY_TYPES: Mapping[str, type[Reply]] = {kind.__name__: kind for kind in (Plan, Solution, Verdict, Answer)}


@dataclass(frozen=True)
class ReplyRecord:
    """The reply to one call of a workflow, identified by the call's number, and what the seat used for it."""

    number: int
    seat: str
    reply: Reply | Unusable
    used: Usage

    @classmethod
    def of(cls, event: RoleReplied) -> Self:
        """Return the record of a reply that has just come."""
        return cls(event.number, event.seat, event.reply, event.usage)

    def as_json(self) -> dict[str, Any]:
        """Return the record as JSON for the journal."""
        reply = self.reply
        content = {"why": reply.why} if isinstance(reply, Unusable) else reply.model_dump(mode="json")
        return {
            "number": self.number,
            "seat": self.seat,
            "reply": {"kind": type(reply).__name__, **content},
            "used": asdict(self.used),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the record that `as_json` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        content = dict(data["reply"])
        kind = content.pop("kind")
        reply = Unusable(**content) if kind == Unusable.__name__ else _REPLY_TYPES[kind].model_validate(content)
        return cls(data["number"], data["seat"], reply, Usage(**data["used"]))
