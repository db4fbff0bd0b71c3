"""The view of a residency policy: which engines are on the device, who wants them, and what moving them costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from runtime.engines.handle import SLEEPING, EngineState
from runtime.residency.idle_times import IdleTimes

STAYS = 2.0
"""An engine that woke stays for at least this many times as long as it took to wake."""


@dataclass(frozen=True)
class Residence:
    """One engine. Sizes are in bytes, times in seconds.

    - `awake_bytes`: what it needs at least while it is awake: weights, buffers and the smallest KV cache.
    - `asleep_bytes`: what it keeps on the device while it sleeps.
    - `calls`: its requests, those that it holds included, and calls that are about to be sent to it.
    - `held_s`: how long the oldest request has been held; 0 if none is.
    - `idle_s`: for how long it has had no calls; 0 while it has some.
    - `awake_s`: for how long it has been awake.
    - `next_call_s`: the time until running jobs will probably call it; infinite if none will, 0 while it has calls.
    - `lead_s`: how long after the beginning of a job its first call of this engine usually comes; 0 if unknown.
    - `sleep_s`, `wake_s`: how long it takes to go to sleep and to wake.
    - `may_sleep`: False if its configuration keeps it awake.
    - `priority`: the most urgent one of its seats; 1 is the most urgent of all.
    """

    name: str
    state: EngineState
    awake_bytes: int
    asleep_bytes: int = 0
    calls: int = 0
    held_s: float = 0.0
    idle_s: float = 0.0
    awake_s: float = 0.0
    next_call_s: float = 0.0
    lead_s: float = 0.0
    sleep_s: float = 0.0
    wake_s: float = 0.0
    may_sleep: bool = True
    priority: int = 1
    idle_times: IdleTimes = field(default_factory=IdleTimes)

    @property
    def awake(self) -> bool:
        """True if it serves requests."""
        return self.state is EngineState.READY

    @property
    def sleeps(self) -> bool:
        """True if it can be woken."""
        return self.state in SLEEPING

    @property
    def held_bytes(self) -> int:
        """The bytes that it needs on the device. A draining engine counts as asleep."""
        if self.state in (EngineState.FAILED, EngineState.CLOSED):
            return 0
        return self.asleep_bytes if self.sleeps or self.state is EngineState.DRAINING else self.awake_bytes

    @property
    def has_stayed(self) -> bool:
        """True if it has been awake for long enough to pay for its wake."""
        return self.awake_s >= STAYS * self.wake_s

    @property
    def can_leave(self) -> bool:
        """True if it is awake, has no calls, may sleep, and has stayed."""
        return self.awake and self.may_sleep and not self.calls and self.has_stayed


@dataclass(frozen=True)
class ResidencySnapshot:
    """The engines of a device at one moment. Together they may hold `budget_bytes`."""

    now_s: float
    budget_bytes: int
    engines: Mapping[str, Residence]

    @cached_property
    def residences(self) -> Sequence[Residence]:
        """The engines, in their order."""
        return tuple(self.engines.values())

    @cached_property
    def free_bytes(self) -> int:
        """The bytes that are free for engines to wake, once those that drain sleep and those that are awake shrink."""
        return self.budget_bytes - sum(engine.held_bytes for engine in self.residences)
