"""What happens, as typed events; whoever wants to hear registers a listener.

Listeners are called at once, in the event loop, in the order of registration; they must not block.
"""

from collections.abc import Callable
from dataclasses import dataclass

from agents.workflow import Entry
from runtime.engines.base import EngineState


@dataclass(frozen=True)
class EngineChanged:
    """An engine entered a state; `seconds` since its fleet began to start."""

    engine: str
    state: EngineState
    seconds: float


@dataclass(frozen=True)
class RoleReplied:
    """A seat replied in a job."""

    job: str
    entry: Entry


@dataclass(frozen=True)
class JobEnded:
    """A job has its answer, or failed."""

    job: str
    answer: str | None
    error: str | None
    seconds: float


Event = EngineChanged | RoleReplied | JobEnded
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener of those who do not want to hear."""
