"""The interface of residency policies, and the steps that they share.

A residency policy decides which engines are on the device. It runs before the policies that divide the memory among
those engines. Like them, it is pure: no clock, no I/O, no state between decisions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from runtime.control.policy import Configurable
from runtime.residency.snapshot import Residence, ResidencySnapshot

HELD_S = 10.0
"""A request that has been held for this long may make a busy engine sleep."""


@dataclass(frozen=True)
class ResidencyDecision:
    """The engines that go to sleep, those that wake after that, in this order, and why.

    `reasons` has a reason for each of them.
    """

    sleep: tuple[str, ...] = ()
    wake: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)


class ResidencyPolicy(Configurable, ABC):
    """A rule for which engines are awake. `name` is the name that it was chosen by."""

    name = ""

    @abstractmethod
    def decide(self, snapshot: ResidencySnapshot) -> ResidencyDecision:
        """Return which engines go to sleep and which wake. The engines must fit the budget together afterwards."""


class Moves:
    """The moves of a decision while it is made. Every move fits those before it.

    `order` says which idle engine leaves first if memory is needed: the one with the smallest value.
    """

    def __init__(self, snapshot: ResidencySnapshot, order: Callable[[Residence], float]) -> None:
        self._snapshot = snapshot
        self._order = order
        self._free_bytes = snapshot.free_bytes
        self._sleep: list[str] = []
        self._wake: list[str] = []
        self._reasons: dict[str, str] = {}

    @property
    def decision(self) -> ResidencyDecision:
        """The moves so far."""
        return ResidencyDecision(tuple(self._sleep), tuple(self._wake), self._reasons)

    def sleep(self, engine: Residence, reason: str) -> None:
        """Let an engine go to sleep."""
        if engine.name not in self._reasons:
            self._sleep.append(engine.name)
            self._reasons[engine.name] = reason
            self._free_bytes += engine.awake_bytes - engine.asleep_bytes

    def wake(self, engine: Residence, reason: str, leaving: Iterable[Residence] = ()) -> bool:
        """Wake an engine, after as many of the `leaving` engines as necessary have gone to sleep.

        Return False, and move nothing, if memory is not enough even then.
        """
        missing_bytes = engine.awake_bytes - engine.asleep_bytes - self._free_bytes
        chosen = []
        for other in sorted(leaving, key=self._order):
            if missing_bytes <= 0:
                break
            if other.name not in self._reasons:
                chosen.append(other)
                missing_bytes -= other.awake_bytes - other.asleep_bytes
        if missing_bytes > 0 or engine.name in self._reasons:
            return False
        for other in chosen:
            self.sleep(other, f"makes room for {engine.name}")
        self._wake.append(engine.name)
        self._reasons[engine.name] = reason
        self._free_bytes -= engine.awake_bytes - engine.asleep_bytes
        return True

    def wake_for_calls(self) -> None:
        """Wake every engine that holds requests, the most urgent and longest held first, if memory can be had.

        Idle engines leave for it. Engines with calls leave only if a request has been held for too long, or if the
        budget was cut below what the awake engines need.
        """
        residences = self._snapshot.residences
        for engine in residences:
            if engine.sleeps and not engine.may_sleep:
                self.wake(engine, "it never sleeps")
        for engine in sorted((each for each in residences if each.awake and each.may_sleep), key=self._order):
            if self._free_bytes < 0:
                self.sleep(engine, "the budget has become too small for it")
        holding = [engine for engine in residences if engine.sleeps and engine.calls]
        for engine in sorted(holding, key=lambda each: (each.priority, -each.held_s)):
            reason = f"{engine.calls} calls wait for it"
            if self.wake(engine, reason, (other for other in residences if other.can_leave)):
                continue
            if engine.held_s >= HELD_S:
                stayed = (other for other in residences if other.awake and other.may_sleep and other.has_stayed)
                self.wake(engine, f"{reason}, for {engine.held_s:.0f} s", stayed)

    def wakes(self, engine: Residence) -> bool:
        """Return True if an engine is to wake."""
        return engine.name in self._wake

    def waits(self) -> bool:
        """Return True if an engine with calls could not be woken yet."""
        return any(e.sleeps and e.calls and e.name not in self._reasons for e in self._snapshot.residences)


def least_recently_used(engine: Residence) -> float:
    """Order idle engines by the time since their last call, the longest first, and engines with calls last."""
    return -engine.idle_s if not engine.calls else math.inf
