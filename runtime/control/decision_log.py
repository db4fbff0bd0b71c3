"""The log of decisions: a line of JSON each, with all that was seen, decided and done; read back for `troupe
replay`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

from pydantic import TypeAdapter, ValidationError

from runtime.control.policy import Decision
from runtime.control.snapshot import Snapshot
from runtime.engines.grant import Applied, Deferred, Rejected, ResizeOutcome
from runtime.errors import InputError, TroupeError

ROTATE_BYTES = 64 << 20
"""A log of this size becomes NAME.1, and the one that had that name before goes."""


@dataclass(frozen=True)
class Outcome:
    """What came of a grant: "applied", "deferred" or "rejected", with the reason; bytes, seconds and counts."""

    state: str
    moved_bytes: int = 0
    seconds: float = 0.0
    stall_seconds: float = 0.0
    preempted: int = 0
    reason: str = ""

    @classmethod
    def of(cls, outcome: ResizeOutcome) -> Self:
        """The line's form of an engine's answer."""
        match outcome:
            case Applied():
                return cls("applied", outcome.moved_bytes, outcome.seconds, outcome.stall_seconds, outcome.preempted)
            case Deferred():
                return cls("deferred", reason=f"{outcome.held_bytes} bytes are still in use")
            case Rejected():
                return cls("rejected", reason=outcome.reason)


@dataclass(frozen=True)
class Record:
    """One tick of the controller. `fault` says why there is no decision; `shadow` is what the second policy would have
    done; `seconds` from the snapshot to the last outcome; `unfit_pins` why pins were not in force, by engine."""

    policy: str
    cause: str
    snapshot: Snapshot
    decision: Decision | None = None
    fault: str | None = None
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    seconds: float = 0.0
    shadow_policy: str | None = None
    shadow: Decision | None = None
    shadow_fault: str | None = None
    unfit_pins: Mapping[str, str] = field(default_factory=dict)

    @property
    def moved_bytes(self) -> int:
        """What all engines together gave back and took."""
        return sum(outcome.moved_bytes for outcome in self.outcomes.values())


_RECORD = TypeAdapter(Record)


class DecisionLog:
    """Appends records to a file, which is rotated once. A context manager. Raises TroupeError when it cannot write."""

    def __init__(self, path: Path, rotate_bytes: int = ROTATE_BYTES) -> None:
        self.path = path
        self._rotate_bytes = rotate_bytes
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file:
            self._file.close()

    def _open(self) -> None:
        try:
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise TroupeError(f"the log of decisions {self.path}: {error.strerror}") from None

    def write(self, record: Record) -> None:
        """One line."""
        assert self._file is not None
        try:
            if self._file.tell() > self._rotate_bytes:
                self._file.close()
                self.path.replace(self.path.with_name(f"{self.path.name}.1"))
                self._open()
            self._file.write(_RECORD.dump_json(record) + b"\n")
        except OSError as error:
            raise TroupeError(f"the log of decisions {self.path}: {error.strerror}") from None


def read(path: Path) -> Iterator[Record]:
    """The records of a log, a last line that was cut left out. Raises InputError with the line and the key."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield _RECORD.validate_json(line)
                except ValidationError as error:
                    if not line.endswith(b"\n"):  # the writer ended in the middle of it
                        return
                    first = error.errors()[0]
                    place = ".".join(map(str, first["loc"])) or "the line"
                    raise InputError(f"{path}, line {number}: {place}: {first['msg']}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
