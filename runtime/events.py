"""Owns the typed events that engines and jobs send to listeners.

The sender calls each listener in the event loop before it continues. A listener must not block.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from agents.role import Reply
from agents.tool_protocol import ToolCall, ToolUse
from agents.workflow import Entry, Unusable
from runtime.engines.handle import EngineState
from runtime.engines.request import GenerateRequest
from runtime.engines.usage import Usage


@dataclass(frozen=True)
class EngineChanged:
    """An engine entered a state. `seconds` is the time since its fleet began to start."""

    engine: str
    state: EngineState
    seconds: float


@dataclass(frozen=True)
class NodesAwaited:
    """The team waits for nodes of its cluster: `present` of the `wanted` ones are there."""

    present: int
    wanted: int


@dataclass(frozen=True)
class RoleReplied:
    """A seat replied to a call of a job.

    `number` identifies the call, and `usage` is the usage of the request for the reply. `entries` holds what the reply
    added to the transcript, without the tool calls before the reply. If the reply ended early, `note` says why. A job
    that resumes does not send events for the replies that it replays.
    """

    job: str
    number: int
    seat: str
    reply: Reply | Unusable
    usage: Usage
    entries: tuple[Entry, ...]
    note: str = ""


@dataclass(frozen=True)
class ToolCalled:
    """A seat's model called a tool. The tool runs next.

    `number` identifies the workflow's call, and `task` is the call's `task_id`. `usage` is the usage of the request in
    which the model made the tool call.
    """

    job: str
    number: int
    seat: str
    task: str
    call: ToolCall
    usage: Usage


@dataclass(frozen=True)
class ToolReturned:
    """A tool that a seat's model called has returned. `number` identifies the workflow's call."""

    job: str
    number: int
    seat: str
    use: ToolUse


@dataclass(frozen=True)
class JobRestarted:
    """A job starts from its beginning, because its recorded replies do not fit its workflow."""

    job: str


@dataclass(frozen=True)
class JobAdvanced:
    """A job started, or took a reply.

    `replied` is the seat that replied, or empty at the start. `due` counts the calls that the job makes now, by seat.
    `ahead` counts the calls that are certain to follow the open calls, by seat. It is None if the workflow cannot tell.
    `seats` holds all seats that the job's workflow may call.
    """

    job: str
    replied: str
    due: Mapping[str, int]
    ahead: Mapping[str, int] | None
    seats: frozenset[str] = frozenset()


@dataclass(frozen=True)
class CallPaused:
    """An open call of a job started to wait for a tool (`paused`), or needs its engine again (not `paused`)."""

    job: str
    seat: str
    paused: bool


@dataclass(frozen=True)
class CallBegan:
    """A seat calls its engine. The engine gets `request` next.

    `number` identifies the workflow's call, and `retries` counts the unusable replies to it so far. A listener that
    traces adds W3C headers to `trace_headers`, which the engine then gets with the request.
    """

    job: str
    number: int
    seat: str
    engine: str
    request: GenerateRequest
    retries: int = 0
    trace_headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CallFailed:
    """A seat's call to its engine ended without a complete reply, because of an error or a cancellation.

    `request` is the id of the request, `kind` the name of the exception, and `error` its message.
    """

    job: str
    seat: str
    request: str
    kind: str
    error: str


@dataclass(frozen=True)
class CallEnded:
    """A seat's call to its engine has ended with a complete reply.

    Times are seconds on the event loop's clock. The engine sent the reply in chunks. `chunk_times_s` and `chunk_tokens`
    have one value for each chunk. `request` is the id of the request, and `finish` is vLLM's finish reason.
    """

    job: str
    seat: str
    engine: str
    asked_s: float
    chunk_times_s: tuple[float, ...]
    chunk_tokens: tuple[int, ...]
    prompt_tokens: int
    request: str = ""
    finish: str | None = None


@dataclass(frozen=True)
class JobEnded:
    """A job ended after `seconds` with an answer or an error. The error of a cancelled job is "cancelled"."""

    job: str
    answer: str | None
    error: str | None
    seconds: float


Event = (
    EngineChanged
    | NodesAwaited
    | RoleReplied
    | ToolCalled
    | ToolReturned
    | JobRestarted
    | JobAdvanced
    | CallPaused
    | CallBegan
    | CallFailed
    | CallEnded
    | JobEnded
)
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Do nothing: the default listener."""


def fan_out(*listeners: Listener) -> Listener:
    """Return a listener that passes each event to all listeners, in order."""

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell
