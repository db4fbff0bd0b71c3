"""A job: one problem for the team, the states on its way, and what came of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Self

from agents.workflow import Entry
from runtime.engines.request import PRIORITY
from runtime.engines.usage import Usage


class JobState(StrEnum):
    """Where an accepted job stands. CANCELLED by its user, EXPIRED by its deadline or its time budget."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def ended(self) -> bool:
        """Whether nothing comes after it."""
        return not TRANSITIONS[self]


_ENDS = frozenset({JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED})
TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: _ENDS | {JobState.RUNNING},
    JobState.RUNNING: _ENDS | {JobState.QUEUED, JobState.DONE},  # queued again: another try, or another runtime
    **dict.fromkeys((JobState.DONE, *_ENDS), frozenset[JobState]()),
}
"""What may come after each state; the journal refuses everything else."""


@dataclass(frozen=True)
class Job:
    """One accepted problem. `temperature` overrides every seat's; `seed` makes sampling repeatable.

    Once its calls have used `max_tokens` (prompts and replies) no further call is made for it, and it fails. Engines
    serve its calls before those of jobs of a higher `priority` number, and of jobs that began later.
    """

    id: str
    problem: str
    expected: str | None = None
    temperature: float | None = None
    seed: int | None = 0
    max_tokens: int | None = None
    priority: int = PRIORITY


@dataclass(frozen=True)
class JobResult:
    """How a job ended: an answer, or an error.

    `confirmed` when the critics accepted every step's result; None where nobody judged. `transient` when the error was
    an engine's, and another try may do better.
    """

    id: str
    problem: str
    answer: str | None
    confirmed: bool | None = None
    rounds: int = 0
    steps: list[Entry] = field(default_factory=list)
    usage: dict[str, Usage] = field(default_factory=dict)
    elapsed_s: float = 0.0
    expected: str | None = None
    error: str | None = None
    transient: bool = False

    @property
    def correct(self) -> bool | None:
        """Whether the answer is the expected one; None where nothing was expected."""
        return None if self.expected is None else self.answer is not None and _same(self.answer, self.expected)

    def as_json(self) -> dict[str, Any]:
        """The form in which results are printed and stored."""
        return {
            "id": self.id,
            "problem": self.problem,
            "answer": self.answer,
            "confirmed": self.confirmed,
            "rounds": self.rounds,
            "steps": [entry_as_json(entry) for entry in self.steps],
            "usage": {seat: asdict(usage) for seat, usage in self.usage.items()},
            "elapsed_s": round(self.elapsed_s, 4),
            **({"expected": self.expected, "correct": self.correct} if self.expected is not None else {}),
            **({"error": self.error} if self.error is not None else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """What `as_json` wrote. Raises KeyError, TypeError or AttributeError for anything else."""
        return cls(
            id=data["id"],
            problem=data["problem"],
            answer=data["answer"],
            confirmed=data["confirmed"],
            rounds=data["rounds"],
            steps=[Entry(s["role"], s["input"], s["output"], s["verdict"], s["round"]) for s in data["steps"]],
            usage={seat: Usage(**used) for seat, used in data["usage"].items()},
            elapsed_s=data["elapsed_s"],
            expected=data.get("expected"),
            error=data.get("error"),
        )


def entry_as_json(entry: Entry) -> dict[str, Any]:
    """A line of a transcript in the form in which it is printed, stored and published."""
    return {
        "role": entry.seat,
        "input": entry.input,
        "output": entry.output,
        "verdict": entry.verdict,
        "round": entry.round,
    }


def _same(answer: str, expected: str) -> bool:
    """Equal up to blanks, case and a closing full stop."""
    return answer.strip().rstrip(".").casefold() == expected.strip().rstrip(".").casefold()
