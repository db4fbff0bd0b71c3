"""A job, its states and its result."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Self

from agents.workflow import Entry
from runtime.engines.request import PRIORITY
from runtime.engines.usage import Usage
from runtime.jobs import comparison
from runtime.jobs.comparison import Comparison


class JobState(StrEnum):
    """The state of an accepted job.

    A job is CANCELLED by its user, and EXPIRED by its deadline or its time budget.
    """

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def ended(self) -> bool:
        """True if no other state follows."""
        return not TRANSITIONS[self]


_WITHOUT_ANSWER = frozenset({JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED})
TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: _WITHOUT_ANSWER | {JobState.RUNNING},
    JobState.RUNNING: _WITHOUT_ANSWER | {JobState.QUEUED, JobState.DONE},  # queued for another try, or after a restart
    **dict.fromkeys((JobState.DONE, *_WITHOUT_ANSWER), frozenset[JobState]()),
}
"""The states that may follow each state. The journal refuses every other transition."""


@dataclass(frozen=True)
class Job:
    """A problem for a team, and how to work it.

    `expected` is the right answer, and `compare` says how answers are compared with it. Without `compare`, the default
    in comparison.py applies. `temperature` overrides that of every seat; `seed` makes sampling repeatable.

    Once the job's calls have used `max_tokens` (prompts and replies), the job makes no further call and fails. Engines
    serve the calls of jobs with a lower `priority` number first, and among equals those of the job that started first.
    """

    id: str
    problem: str
    expected: str | None = None
    temperature: float | None = None
    seed: int | None = 0
    max_tokens: int | None = None
    priority: int = PRIORITY
    compare: Comparison | None = None


@dataclass(frozen=True)
class JobResult:
    """The end of a job: an answer or an error.

    `confirmed` is True if the critics accepted the result of every step, False if one stayed rejected, and None if no
    critic judged. `judged` is the verdict of the judge who compared the answer with the expected one. `transient` is
    True if an engine caused the error, so that another try may succeed.
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
    compare: Comparison | None = None
    judged: bool | None = None

    @property
    def correct(self) -> bool | None:
        """True if the answer is the expected one; None if none was expected, or if the judge did not say."""
        if self.expected is None:
            return None
        if self.compare is Comparison.JUDGE:
            return self.judged
        return self.answer is not None and comparison.matches(self.answer, self.expected, self.compare)

    def as_json(self) -> dict[str, Any]:
        """Return the result as JSON for the API, the journal and files of results."""
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
            **({"compare": str(self.compare)} if self.compare is not None else {}),
            **({"error": self.error} if self.error is not None else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the result that `as_json` wrote.

        Raises KeyError, TypeError, ValueError or AttributeError for anything else.
        """
        return cls(
            id=data["id"],
            problem=data["problem"],
            answer=data["answer"],
            confirmed=data["confirmed"],
            rounds=data["rounds"],
            steps=[
                Entry(s["role"], s["input"], s["output"], s["verdict"], s["round"], s.get("note", ""))
                for s in data["steps"]
            ],
            usage={seat: Usage(**used) for seat, used in data["usage"].items()},
            elapsed_s=data["elapsed_s"],
            expected=data.get("expected"),
            error=data.get("error"),
            compare=Comparison(data["compare"]) if "compare" in data else None,
            judged=data.get("correct") if data.get("compare") == Comparison.JUDGE else None,
        )


def entry_as_json(entry: Entry) -> dict[str, Any]:
    """Return an entry of a transcript as JSON."""
    return {
        "role": entry.seat,
        "input": entry.input,
        "output": entry.output,
        "verdict": entry.verdict,
        "round": entry.round,
        **({"note": entry.note} if entry.note else {}),
    }
