"""The topics and payloads. All payloads are JSON objects in UTF-8; those that come in are held against these models."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from agents.role import Value, explain
from runtime.commands import Change, Pin
from runtime.errors import InputError
from runtime.jobs.submission import Submission

Correlation = Annotated[str, Field(min_length=1, max_length=200)]


@dataclass(frozen=True)
class Topics:
    """Every topic of a cluster, under `troupe/<cluster>/`."""

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


def schemas() -> dict[str, Any]:
    """The JSON schemas of what comes in, by topic."""
    topics = Topics("<cluster>")
    return {topics.submit: SubmitMessage.model_json_schema(), topics.control: _COMMAND.json_schema()}
