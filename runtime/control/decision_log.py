"""The decision log: one JSON line per decision with what was seen, decided and done. `troupe replay` reads it back."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

from pydantic import TypeAdapter, ValidationError

from agents.role import explain
from runtime.control.policy import Decision
from runtime.control.snapshot import Snapshot
from runtime.engines.grant import Applied, Deferred, Rejected, ResizeOutcome
from runtime.errors import InputError, TroupeError

ROTATE_BYTES = 64 << 20
"""A log that exceeds this size is renamed to NAME.1, replacing an older NAME.1."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a grant: `state` is "applied", "deferred" or "rejected", `reason` says why it was not applied."""

    state: str
    moved_bytes: int = 0
    seconds: float = 0.0
    stall_seconds: float = 0.0
    preempted: int = 0
    reason: str = ""

    @classmethod
    def of(cls, outcome: ResizeOutcome) -> Self:
        """Convert the outcome of a resize."""
        match outcome:
            case Applied():
                return cls("applied", outcome.moved_bytes, outcome.seconds, outcome.stall_seconds, outcome.preempted)
            case Deferred():
                return cls("deferred", reason=f"{outcome.held_bytes} bytes are still in use")
            case Rejected():
                return cls("rejected", reason=outcome.reason)


@dataclass(frozen=True)
class Record:
    """One tick of the controller of a device.

    `cause` says why it decided now. `fault` says why there is no decision. `outcomes` are of the grants that changed.
    `seconds` is from the cause (if there is none, from the snapshot) to the last outcome. `shadow` is what the shadow
    policy would have done, or None and `shadow_fault`. `unfit_pins` says, by engine, why pins were not in force.
    """

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
    device: str = "0"

    @property
    def moved_bytes(self) -> int:
        """The sum of the bytes that engines released and the bytes that they gained."""
        return sum(outcome.moved_bytes for outcome in self.outcomes.values())


_RECORD = TypeAdapter(Record)


def to_line(record: Record) -> bytes:
    """Return a record as a line of the log, without the line break."""
    return _RECORD.dump_json(record)


def from_line(line: bytes) -> Record:
    """Return the record in a line of the log. Raises pydantic.ValidationError."""
    return _RECORD.validate_json(line)


class DecisionLog:
    """A file to which records are appended, and which keeps one rotated predecessor.

    A context manager that owns the open file. Entering and `write` raise TroupeError if the file cannot be written.
    """

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
            raise self._write_error(error) from None

    def write(self, record: Record) -> None:
        """Append a record as one line; rotate the file first if it is too large."""
        assert self._file is not None
        try:
            if self._file.tell() > self._rotate_bytes:
                self._file.close()
                self.path.replace(self.path.with_name(f"{self.path.name}.1"))
                self._open()
            self._file.write(to_line(record) + b"\n")
        except OSError as error:
            raise self._write_error(error) from None

    def _write_error(self, error: OSError) -> TroupeError:
        return TroupeError(f"cannot write the decision log {self.path}: {error.strerror}")


def read(path: Path) -> Iterator[Record]:
    """Yield the records of a log, without a last line that is incomplete. Raises InputError with the line and key."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield from_line(line)
                except ValidationError as error:
                    if not line.endswith(b"\n"):  # the writer was killed while it wrote this line
                        return
                    raise InputError(f"{path}, line {number}: {explain(error, 'the line', most=1)}") from None
    except OSError as error:
        raise InputError(f"cannot read the decision log {path}: {error.strerror}") from None
