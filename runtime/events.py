"""Owns the typed events that engines and jobs send to listeners.

A listener is called directly in the event loop, before the sender continues. It must not block.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from agents.role import Reply
from agents.tool_protocol import ToolCall, ToolUse
from agents.workflow import Entry, Unusable
from runtime.engines.handle import EngineState
from runtime.engines.usage import Usage


@dataclass(frozen=True)
class EngineChanged:
    """An engine entered a state. `seconds` is the time since its fleet began to start."""

    engine: str
    state: EngineState
    seconds: float


@dataclass(frozen=True)
class RoleReplied:
    """A seat replied to a call of a job.

    `number` identifies the call, `usage` is what it used, and `entries` are what the reply added to the transcript,
    without the calls of tools before it.
    `note` says why the reply ended early, if it did. A job that resumes does not repeat the events of the replies that
    it replays.
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
    """A seat's model calls a tool, which runs now. `number` is the call of the job, and `usage` what asking used."""

    job: str
    number: int
    seat: str
    call: ToolCall
    usage: Usage


@dataclass(frozen=True)
class ToolReturned:
    """The tool that a seat's model called has returned."""

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
    """A job started, took a reply, or began or ended to wait for a tool.

    `replied` is the seat that replied, or whose call waits for a tool; it is empty at the start and after a tool. `due`
    counts the calls that are made now, by seat. `ahead` counts the calls that are certain to follow those that are
    open, by seat; it is None if the workflow cannot tell. `seats` are all seats that the job's workflow may call.
    """

    job: str
    replied: str
    due: Mapping[str, int]
    ahead: Mapping[str, int] | None
    seats: frozenset[str] = frozenset()


@dataclass(frozen=True)
class CallEnded:
    """A seat's call to its engine has ended.

    Times are seconds on the event loop's clock. The reply came in chunks: `chunk_times_s` and `chunk_tokens` have one
    value for each.
    """

    job: str
    seat: str
    engine: str
    asked_s: float
    chunk_times_s: tuple[float, ...]
    chunk_tokens: tuple[int, ...]
    prompt_tokens: int


@dataclass(frozen=True)
class JobEnded:
    """A job ended after `seconds`: with an answer, or with an error, which is "cancelled" for a cancelled job."""

    job: str
    answer: str | None
    error: str | None
    seconds: float


Event = EngineChanged | RoleReplied | ToolCalled | ToolReturned | JobRestarted | JobAdvanced | CallEnded | JobEnded
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Do nothing: the default listener."""


def fan_out(*listeners: Listener) -> Listener:
    """Return a listener that passes each event to all listeners, in order."""

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell
