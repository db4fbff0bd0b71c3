"""A job: one problem for the team, and what came of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from agents.workflow import Entry


@dataclass(frozen=True)
class Job:
    """One accepted problem. `temperature` overrides every seat's; `seed` makes sampling repeatable."""

    id: str
    problem: str
    expected: str | None = None
    temperature: float | None = None
    seed: int | None = 0


@dataclass
class Usage:
    """What one seat used in a job, summed over calls: tokens, seconds between asking and the last token, and its part
    of the engine: of its memory (bytes times seconds) and of its time. `cost` where the configuration has a price."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    byte_seconds: float = 0.0
    engine_seconds: float = 0.0
    cost: float | None = None

    def add(self, other: "Usage") -> None:
        """Count another's use to this one."""
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.seconds += other.seconds
        self.byte_seconds += other.byte_seconds
        self.engine_seconds += other.engine_seconds
        if other.cost is not None:
            self.cost = (self.cost or 0.0) + other.cost


@dataclass(frozen=True)
class JobResult:
    """How a job ended: an answer, or an error.

    `confirmed` when the critics accepted every step's result; None where nobody judged.
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
            "steps": [
                {"role": e.seat, "input": e.input, "output": e.output, "verdict": e.verdict, "round": e.round}
                for e in self.steps
            ],
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


def _same(answer: str, expected: str) -> bool:
    """Equal up to blanks, case and a closing full stop."""
    return answer.strip().rstrip(".").casefold() == expected.strip().rstrip(".").casefold()
