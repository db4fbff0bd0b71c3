"""The messages between the head and its agents, in MessagePack.

The types are the schema: `Decoder` raises CannotRead for anything else. Times on a machine's own clock never cross;
durations do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import msgspec

from runtime.engines.grant import EngineLimits, Grant
from runtime.engines.handle import EngineState, EngineStats, Recalled
from runtime.engines.request import Chunk, GenerateRequest
from runtime.engines.usage import Account
from runtime.errors import Death, EngineDead, EngineError, RequestRefused
from runtime.residency import keeper

VERSION = 4
"""Raise it with every change of a message. A head and an agent of different versions refuse each other."""
T = TypeVar("T")


class CannotRead(Exception):
    """Bytes are not messages of this version."""


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The base of all messages."""


# From the head to an agent. `number` names a call, that is, anything that the head waits for.


class Generate(Message, frozen=True):
    """Stream the reply to a request. `age_s` is for how long its job has run; None if it belongs to none."""

    number: int
    replica: str
    request: GenerateRequest
    age_s: float | None


class UntilReady(Message, frozen=True):
    """Answer once a replica serves."""

    number: int
    replica: str


class Add(Message, frozen=True):
    """Start an absent replica."""

    number: int
    replica: str


class Remove(Message, frozen=True):
    """Let a replica finish the requests that have a token, then end it."""

    number: int
    replica: str


class Excuse(Message, frozen=True):
    """A request caused a death of a replica: see EngineHandle.excuse_death."""

    replica: str


class Abort(Message, frozen=True):
    """Cancel a call."""

    number: int


class Expected(msgspec.Struct, frozen=True):
    """The calls that a device's replicas can expect: see control.forecast.Forecast and residency.call_times.

    `waiting` counts the requests that wait at the head until a replica serves.
    """

    open_calls: Mapping[str, int]
    soon: Mapping[str, float]
    coming: Mapping[str, float]
    next_call_s: Mapping[str, float]
    lead_s: Mapping[str, float]
    waiting: Mapping[str, int]


class Expect(Message, frozen=True):
    """The calls that each device can expect. The head sends them regularly, which also shows that the head lives."""

    devices: Mapping[str, Expected]


class ExpectJob(Message, frozen=True):
    """A job was refused because no engine of this device could wake in time: see Keeper.expect_job."""

    device: str


class UsePolicy(Message, frozen=True):
    """Let another policy decide on a device, within another budget if one is given. `policy` is a PolicyChoice."""

    device: str
    policy: Mapping[str, Any]
    budget_bytes: int | None


class Pause(Message, frozen=True):
    """Stop, or start, deciding on a device."""

    device: str
    paused: bool


class Pin(Message, frozen=True):
    """Hold an engine at a grant, or with None no longer."""

    device: str
    replica: str
    grant: Grant | None


ToAgent = Generate | UntilReady | Add | Remove | Excuse | Abort | Expect | ExpectJob | UsePolicy | Pause | Pin


# From an agent to the head.


class Streamed(Message, frozen=True):
    """The next chunk of a reply."""

    number: int
    chunk: Chunk


class Failure(msgspec.Struct, frozen=True):
    """An error of a call: the name of its class, its message, and how the engine ended if it did."""

    kind: str
    text: str
    death: Death | None = None


class Ended(Message, frozen=True):
    """A call has ended: its failure, or None."""

    number: int
    failure: Failure | None = None


class Died(Message, frozen=True):
    """A replica's process that served requests has died."""

    replica: str
    death: Death


class Entered(Message, frozen=True):
    """A replica has entered a state, so many seconds after its fleet began to start."""

    replica: str
    state: EngineState
    seconds: float


class EngineReport(msgspec.Struct, frozen=True):
    """A replica's figures: see EngineHandle."""

    stats: EngineStats
    limits: EngineLimits | None
    asleep_bytes: int = 0
    silent: bool = False
    ready: bool = False


class ControlCounts(msgspec.Struct, frozen=True):
    """The counts of a controller since the agent started, and the reaction times since the last report."""

    decisions: int = 0
    faults: int = 0
    resizes: int = 0
    rejected: int = 0
    moved_bytes: int = 0
    preempted: int = 0
    reactions_s: Sequence[float] = ()


class DeviceReport(msgspec.Struct, frozen=True):
    """A device's figures: its replicas, its ledger, its controller and its keeper."""

    engines: Mapping[str, EngineReport]
    budget_bytes: int
    held: Mapping[str, int]
    reserved_bytes: int
    counts: ControlCounts
    policy: str
    paused: bool
    pinned: Mapping[str, Grant]
    unfit_pins: Mapping[str, str]
    residency_counts: keeper.Counts
    residency_policy: str
    job_wait_s: float


class Beat(Message, frozen=True):
    """The figures of all devices of an agent."""

    devices: Mapping[str, DeviceReport]


class Recorded(Message, frozen=True):
    """A decision on a device, as a line of the decision log."""

    record: bytes


FromAgent = Streamed | Ended | Died | Entered | Beat | Recorded


class Decoder(Generic[T]):
    """A decoder of the messages that `encode` has written."""

    def __init__(self, kind: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[list[T]] = msgspec.msgpack.Decoder(list[kind])

    def decode(self, data: bytes) -> list[T]:
        """Return the messages. Raises CannotRead."""
        try:
            return self._decoder.decode(data)
        except msgspec.DecodeError as error:
            raise CannotRead(str(error)) from error


to_agent: Decoder[ToAgent] = Decoder(ToAgent)
from_agent: Decoder[FromAgent] = Decoder(FromAgent)
_encoder = msgspec.msgpack.Encoder()


def encode(messages: Sequence[ToAgent] | Sequence[FromAgent]) -> bytes:
    """Return messages as bytes."""
    return _encoder.encode(messages)


def generate(number: int, replica: str, request: GenerateRequest, now_s: float) -> Generate:
    """Return the message for a request. Raises RequestRefused if it holds what cannot be sent."""
    age_s = None if request.since_s is None else now_s - request.since_s
    message = Generate(number, replica, replace(request, since_s=None, account=Account()), age_s)
    try:
        to_agent.decode(_encoder.encode([message]))
    except (OverflowError, TypeError, ValueError, RecursionError, CannotRead) as error:
        raise RequestRefused(f"the request cannot be sent to engine {replica}: {error}") from None
    return message


def received(message: Generate, now_s: float) -> GenerateRequest:
    """Return the request of a message, with times on this machine's clock."""
    return replace(message.request, since_s=None if message.age_s is None else now_s - message.age_s)


_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (EngineDead, EngineError, Recalled, RequestRefused)
}


def failure_of(error: Exception) -> Failure:
    """Return an error as it is sent."""
    kind = type(error).__name__
    if kind not in _ERRORS:
        return Failure(EngineError.__name__, f"{kind}: {error}")
    return Failure(kind, str(error), error.death if isinstance(error, EngineDead) else None)


def error_of(failure: Failure) -> Exception:
    """Return the error that was sent."""
    if failure.kind == EngineDead.__name__:
        return EngineDead(failure.text, failure.death or Death.CRASHED)
    return _ERRORS.get(failure.kind, EngineError)(failure.text)
