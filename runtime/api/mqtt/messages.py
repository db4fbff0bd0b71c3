"""The topics and payloads. All payloads are JSON objects in UTF-8; those that come in are held against these models."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from agents.role import Value, explain
from runtime.api.admin import Change, Pin
from runtime.api.monitor import DecisionShown
from runtime.control.snapshot import DeviceView, EngineMoment
from runtime.engines.handle import EngineState
from runtime.errors import InputError
from runtime.jobs.job import JobState
from runtime.jobs.schemas import EventView, JobView
from runtime.jobs.submission import Submission

Correlation = Annotated[str, Field(min_length=1, max_length=200)]


@dataclass(frozen=True)
class Topics:
    """Every topic of a cluster, under `troupe/<cluster>/`. What each carries is in `reference`."""

    cluster: str

    def under(self, *levels: str) -> str:
        """A topic below the cluster's."""
        return "/".join(("troupe", self.cluster, *levels))

    @property
    def state(self) -> str:
        """Retained: whether the service lives; the broker says "gone" when it does not."""
        return self.under("state")

    @property
    def submit(self) -> str:
        """In: SubmitMessage."""
        return self.under("jobs", "submit")

    @property
    def rejected(self) -> str:
        """A submission that was not accepted: correlation_id (null where it could not be read) and error."""
        return self.under("jobs", "rejected")

    def accepted(self, job: str) -> str:
        """A job is in the journal: id, correlation_id, state, and whether it is new."""
        return self.under("jobs", job, "accepted")

    def events(self, job: str) -> str:
        """What happens to a job, as /jobs/{id}/events has it."""
        return self.under("jobs", job, "events")

    def result(self, job: str) -> str:
        """A job that has ended, as /jobs/{id} has it."""
        return self.under("jobs", job, "result")

    @property
    def control(self) -> str:
        """In: a command."""
        return self.under("control")

    @property
    def control_result(self) -> str:
        """What came of a command: correlation_id, and error where it was refused."""
        return self.under("control", "result")

    def role(self, seat: str) -> str:
        """Retained: a role's engine and what that does."""
        return self.under("roles", _level(seat), "state")

    def grant(self, engine: str) -> str:
        """Retained: what an engine may use."""
        return self.under("engines", _level(engine), "grant")

    def device(self, number: int) -> str:
        """Retained: what telemetry says of a device."""
        return self.under("gpu", str(number))

    @property
    def decision(self) -> str:
        """Retained: the controller's last decision that changed something, with its reasons."""
        return self.under("controller", "decision")


def _level(name: str) -> str:
    """A configured name as a level of a topic, which has no slash and no wildcard in it."""
    return name.replace("/", "_").replace("+", "_").replace("#", "_")


class Liveness(Value):
    """Whether the service lives: "up", "ended" in good order, or, as the broker says for it, "gone"."""

    state: Literal["up", "ended", "gone"]


class Accepted(Value):
    """A job is in the journal; `new` unless it was before, under the same key."""

    id: str
    correlation_id: str
    state: JobState
    new: bool


class Refused(Value):
    """A submission that was not accepted, and why; `correlation_id` null where it could not be read."""

    correlation_id: str | None
    error: str


class Obeyed(Value):
    """What came of a command; `error` where it was refused."""

    correlation_id: str | None
    error: str | None = None


class RoleState(Value):
    """A role, the engine that serves it, and what that does; `now` null until the engine is up."""

    engine: str
    state: EngineState | None
    now: EngineMoment | None


class GrantState(Value):
    """What an engine may use: its share of the device, the KV cache that this leaves it, sequences at once."""

    gpu_memory_utilization: float
    kv_cache_bytes: int
    max_active_seqs: int


class SubmitMessage(Submission):
    """A job, and by what its answer is known again. Sent twice (QoS 1), it is one job."""

    correlation_id: Correlation

    @property
    def submission(self) -> Submission:
        """The job; where it has no key of its own, the correlation id is it."""
        fields = self.model_dump(exclude={"correlation_id"})
        fields["idempotency_key"] = fields["idempotency_key"] or self.correlation_id
        return Submission.model_validate(fields)


class ChangeCommand(Change):
    """Pause or resume the controller, or let another policy decide."""

    command: Literal["change"]
    correlation_id: Correlation | None = None


class PinCommand(Pin):
    """Hold an engine at a grant."""

    command: Literal["pin"]
    engine: str
    correlation_id: Correlation | None = None


class UnpinCommand(Value):
    """Let policies decide about an engine again."""

    command: Literal["unpin"]
    engine: str
    correlation_id: Correlation | None = None


class CancelCommand(Value):
    """Cancel a job."""

    command: Literal["cancel"]
    job: str
    correlation_id: Correlation | None = None


Command = Annotated[ChangeCommand | PinCommand | UnpinCommand | CancelCommand, Field(discriminator="command")]
_COMMAND: TypeAdapter[Command] = TypeAdapter(Command)
_ANY: TypeAdapter[Any] = TypeAdapter(Any)


def read_submission(payload: bytes) -> SubmitMessage:
    """Raises InputError naming each field and what would be right."""
    try:
        return SubmitMessage.model_validate_json(payload)
    except ValidationError as error:
        raise InputError(explain(error)) from None


def read_command(payload: bytes) -> Command:
    """Raises InputError naming each field and what would be right."""
    try:
        return _COMMAND.validate_json(payload)
    except ValidationError as error:
        raise InputError(explain(error)) from None


def correlation_of(payload: bytes) -> str | None:
    """The correlation id of a message that is wrong otherwise, if it has one."""
    try:
        found = _ANY.validate_json(payload)
    except ValidationError:
        return None
    value = found.get("correlation_id") if isinstance(found, dict) else None
    return value[:200] if isinstance(value, str) else None


@dataclass(frozen=True)
class TopicInfo:
    """One topic, for readers: its name with places to fill in, whether it comes in, QoS, and its payload."""

    topic: str
    comes_in: bool
    qos: int
    retained: bool
    payload: TypeAdapter[Any]
    says: str


def reference(cluster: str = "<cluster>") -> list[TopicInfo]:
    """Every topic, with the schema of its payload."""
    topics, job = Topics(cluster), "<id>"
    rows: list[tuple[str, bool, int, bool, Any, str]] = [
        (topics.submit, True, 1, False, SubmitMessage, "submit a job"),
        (topics.accepted(job), False, 1, False, Accepted, "it is in the journal"),
        (topics.rejected, False, 1, False, Refused, "it was not accepted, and why"),
        (topics.events(job), False, 0, False, EventView, "what happens to it"),
        (topics.result(job), False, 1, False, JobView, "it has ended"),
        (topics.control, True, 1, False, Command, "change, pin, unpin, cancel"),
        (topics.control_result, False, 1, False, Obeyed, "what came of a command"),
        (topics.state, False, 1, True, Liveness, "whether the service lives"),
        (topics.role("<role>"), False, 0, True, RoleState, "a role and its engine"),
        (topics.grant("<name>"), False, 0, True, GrantState, "what an engine may use"),
        (topics.under("gpu", "<n>"), False, 0, True, DeviceView, "what telemetry says of the device"),
        (topics.decision, False, 0, True, DecisionShown, "the last decision that changed something"),
    ]
    return [TopicInfo(*row[:4], TypeAdapter(row[4]), row[5]) for row in rows]
