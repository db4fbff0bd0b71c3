"""MQTT topics and payloads. All payloads are JSON objects in UTF-8; incoming ones must fit their models."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from agents.role import Value, explain
from runtime.api.admin import Change, Pin
from runtime.api.monitor import DecisionShown
from runtime.control.snapshot import DeviceMoment, EngineMoment
from runtime.engines.handle import EngineState
from runtime.errors import InputError
from runtime.jobs.job import JobState
from runtime.jobs.schemas import EventView, JobView
from runtime.jobs.submission import Submission

Correlation = Annotated[str, Field(min_length=1, max_length=200)]


@dataclass(frozen=True)
class Topics:
    """The topics of a cluster, all below `troupe/<cluster>/`. `reference` lists them with their payloads."""

    cluster: str

    def under(self, *levels: str) -> str:
        """Return the topic with these levels below the cluster's."""
        return "/".join(("troupe", self.cluster, *levels))

    @property
    def state(self) -> str:
        """Outgoing, retained: Liveness. The broker publishes "gone" if the service's connection breaks."""
        return self.under("state")

    @property
    def submit(self) -> str:
        """Incoming: SubmitMessage."""
        return self.under("jobs", "submit")

    @property
    def rejected(self) -> str:
        """Outgoing: SubmissionRejected."""
        return self.under("jobs", "rejected")

    def accepted(self, job: str) -> str:
        """Outgoing: SubmissionAccepted."""
        return self.under("jobs", job, "accepted")

    def events(self, job: str) -> str:
        """Outgoing: the job's events, in the form of GET /jobs/{id}/events."""
        return self.under("jobs", job, "events")

    def result(self, job: str) -> str:
        """Outgoing: a job that has ended, in the form of GET /jobs/{id}."""
        return self.under("jobs", job, "result")

    @property
    def control(self) -> str:
        """Incoming: a Command."""
        return self.under("control")

    @property
    def control_result(self) -> str:
        """Outgoing: CommandAnswer."""
        return self.under("control", "result")

    def role(self, seat: str) -> str:
        """Outgoing, retained: RoleState."""
        return self.under("roles", _level(seat), "state")

    def grant(self, engine: str) -> str:
        """Outgoing, retained: GrantState."""
        return self.under("engines", _level(engine), "grant")

    def device(self, name: str) -> str:
        """Outgoing, retained: the telemetry of a device, and how many engines it serves at full speed at once."""
        return self.under("gpu", _level(name))

    @property
    def decision(self) -> str:
        """Outgoing, retained: the controller's last decision that changed a grant or failed, with its reasons."""
        return self.under("controller", "decision")


def _level(name: str) -> str:
    """Return a configured name as one level of a topic: without slashes and wildcards."""
    return name.replace("/", "_").replace("+", "_").replace("#", "_")


class Liveness(Value):
    """The state of the service: "up", "ended" after an orderly end, or "gone", which the broker publishes for it."""

    state: Literal["up", "ended", "gone"]


class SubmissionAccepted(Value):
    """A job that is in the journal. `new` is false if a job with the same idempotency key already was."""

    id: str
    correlation_id: str
    state: JobState
    new: bool


class SubmissionRejected(Value):
    """A submission that was not accepted, and why. `correlation_id` is null if it could not be read."""

    correlation_id: str | None
    error: str


class CommandAnswer(Value):
    """The outcome of a command. `error` says why it was refused, and is null if it was executed."""

    correlation_id: str | None
    error: str | None = None


class RoleState(Value):
    """A role, its engine, and the engine's state and load. `now` is null until the engine is ready."""

    engine: str
    state: EngineState | None
    now: EngineMoment | None


class GrantState(Value):
    """An engine's grant: its share of the device, the KV cache that fits into this share, and its concurrency.

    A `max_active_seqs` of 0 pauses admission.
    """

    gpu_memory_utilization: float
    kv_cache_bytes: int
    max_active_seqs: int


class SubmitMessage(Submission):
    """A job to submit. `correlation_id` comes back in the answer.

    `correlation_id` is also the idempotency key of a job without one, so a message that is delivered twice (QoS 1)
    submits one job.
    """

    correlation_id: Correlation

    @property
    def submission(self) -> Submission:
        """The job, with `correlation_id` as its idempotency key if it has none of its own."""
        fields = self.model_dump(exclude={"correlation_id"})
        fields["idempotency_key"] = fields["idempotency_key"] or self.correlation_id
        return Submission.model_validate(fields)


class ChangeCommand(Change):
    """Pause or resume the controller, or change its policy."""

    command: Literal["change"]
    correlation_id: Correlation | None = None


class PinCommand(Pin):
    """Pin an engine to a grant."""

    command: Literal["pin"]
    engine: str
    correlation_id: Correlation | None = None


class UnpinCommand(Value):
    """Remove an engine's pin, so that the policy decides its grant again."""

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
    """Parse a payload. Raises InputError that names each wrong field and what would be right."""
    try:
        return SubmitMessage.model_validate_json(payload)
    except ValidationError as error:
        raise InputError(explain(error, "the message")) from None


def read_command(payload: bytes) -> Command:
    """Parse a payload. Raises InputError that names each wrong field and what would be right."""
    try:
        return _COMMAND.validate_json(payload)
    except ValidationError as error:
        raise InputError(explain(error, "the message")) from None


def correlation_of(payload: bytes) -> str | None:
    """Return the correlation id of a payload that may be invalid, or None if it has none."""
    try:
        data = _ANY.validate_json(payload)
    except ValidationError:
        return None
    value = data.get("correlation_id") if isinstance(data, dict) else None
    return value[:200] if isinstance(value, str) else None


@dataclass(frozen=True)
class TopicInfo:
    """The documentation of one topic. `topic` has placeholders such as `<id>`."""

    topic: str
    incoming: bool
    qos: int
    retained: bool
    payload: TypeAdapter[Any]
    description: str


def reference(cluster: str = "<cluster>") -> list[TopicInfo]:
    """Return the documentation of every topic, with the schema of its payload."""
    topics, job = Topics(cluster), "<id>"

    def incoming(topic: str, payload: Any, description: str) -> TopicInfo:
        return TopicInfo(topic, True, 1, False, TypeAdapter(payload), description)

    def outgoing(topic: str, qos: int, payload: Any, description: str) -> TopicInfo:
        return TopicInfo(topic, False, qos, False, TypeAdapter(payload), description)

    def retained(topic: str, qos: int, payload: Any, description: str) -> TopicInfo:
        return TopicInfo(topic, False, qos, True, TypeAdapter(payload), description)

    return [
        incoming(topics.submit, SubmitMessage, "submit a job"),
        outgoing(topics.accepted(job), 1, SubmissionAccepted, "the job is in the journal"),
        outgoing(topics.rejected, 1, SubmissionRejected, "a submission was rejected, and why"),
        outgoing(topics.events(job), 0, EventView, "an event of the job"),
        outgoing(topics.result(job), 1, JobView, "the job has ended"),
        incoming(topics.control, Command, "change, pin, unpin or cancel"),
        outgoing(topics.control_result, 1, CommandAnswer, "the outcome of a command"),
        retained(topics.state, 1, Liveness, "whether the service is up"),
        retained(topics.role("<role>"), 0, RoleState, "a role and its engine"),
        retained(topics.grant("<name>"), 0, GrantState, "an engine's grant"),
        retained(topics.under("gpu", "<n>"), 0, DeviceMoment, "telemetry and lanes of the device"),
        retained(topics.decision, 0, DecisionShown, "the last decision that changed a grant or failed"),
    ]
