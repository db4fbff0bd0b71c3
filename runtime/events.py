"""What happens, as typed events; whoever wants to hear registers a listener.

Listeners are called at once, in the event loop, in the order of registration; they must not block.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from agents.role import Reply
from agents.workflow import Entry, Unusable
from runtime.engines.handle import EngineState
from runtime.engines.usage import Usage


@dataclass(frozen=True)
class EngineChanged:
    """An engine entered a state; `seconds` since its fleet began to start."""

    engine: str
    state: EngineState
    seconds: float


@dataclass(frozen=True)
class RoleReplied:
    """A seat replied in a job: the reply to its call of that number, what the call used, and the lines that the reply
    added to the transcript. Those taken again, in a job that is resumed, are not told again."""

    job: str
    number: int
    seat: str
    reply: Reply | Unusable
    usage: Usage
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class JobBegunAnew:
    """The replies that a job had before do not fit its workflow any more: they are dropped."""

    job: str


@dataclass(frozen=True)
class JobAdvanced:
    """A job begins, or a seat of it has replied: the calls that are due now, by seat, and those that are certain to
    come after those that are open (None where the workflow does not know yet). `replied` is empty at the beginning."""

    job: str
    replied: str
    due: Mapping[str, int]
    ahead: Mapping[str, int] | None


@dataclass(frozen=True)
class CallEnded:
    """A seat's call to its engine is over. Times on the event loop's clock, in seconds; a time for every chunk of
    tokens that came, and the tokens of each."""

    job: str
    seat: str
    engine: str
    asked_s: float
    chunk_times_s: tuple[float, ...]
    chunk_tokens: tuple[int, ...]
    prompt_tokens: int


@dataclass(frozen=True)
class JobEnded:
    """A job has its answer, or failed, or was cancelled."""

    job: str
    answer: str | None
    error: str | None
    seconds: float


Event = EngineChanged | RoleReplied | JobBegunAnew | JobAdvanced | CallEnded | JobEnded
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener of those who do not want to hear."""


def fan_out(*listeners: Listener) -> Listener:
    """One listener that tells all of them, in order."""

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell
