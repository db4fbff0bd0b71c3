"""Changes where engines have replicas while the team runs: looks at the devices, asks `rebalancing`, and acts."""

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from runtime.devices.handle import DeviceHandle
from runtime.devices.rebalancing import Action, DeviceLoad, EngineRange, PlacementView, ReplicaView, decide, load_of
from runtime.engines.handle import EngineState
from runtime.engines.replicas import device_of, engine_of, replica_name
from runtime.errors import EngineError

EVERY_S = 1.0
AGAIN_S = 60.0
"""The rebalancer leaves a replica alone for so many seconds after it could not add or remove it."""
CHANGES_KEPT = 200
_AWAY = (EngineState.ABSENT, EngineState.FAILED, EngineState.CLOSED)


@dataclass(frozen=True)
class Change:
    """A change of the placement: the replica that was added, the one that was removed, why, and how long it took.

    `at` is in seconds since 1970. `error` says why it failed, or is None.
    """

    at: float
    added: str | None
    removed: str | None
    reason: str
    seconds: float
    error: str | None = None


class Rebalancer:
    """The owner of the placement of a team's engines, as an async context manager: it acts while it is entered.

    `bounds` are the fewest and the most replicas of the engines whose number may change. There are at most as many as
    devices that are not lost. `changes` has the latest changes, and `log` takes one line of JSON for each.
    """

    def __init__(
        self, devices: Mapping[str, DeviceHandle], bounds: Mapping[str, tuple[int, int]], log: Path | None = None
    ) -> None:
        self.changes: deque[Change] = deque(maxlen=CHANGES_KEPT)
        self._devices = devices
        self.bounds = dict(bounds)
        self._log = log
        self._above, self._below = _Durations(), _Durations()
        self._called_s: dict[str, float] = {}
        self._arrived: dict[str, int] = {}
        self._refused_until_s: dict[str, float] = {}
        self._acting: dict[asyncio.Task[None], Action] = {}
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="rebalancer")
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._task is not None
        tasks = [self._task, *self._acting]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def _run(self) -> None:
        while True:
            try:
                self.tick()
            except Exception:
                logging.getLogger(__name__).exception("the placement cannot be decided")
            await asyncio.sleep(EVERY_S)

    def tick(self) -> None:
        """Look at the devices, decide, and begin the actions."""
        busy = {name for action in self._acting.values() for name in _engines_of(action)}
        for action in decide(self._view(asyncio.get_running_loop().time(), busy)):
            task = asyncio.create_task(self._act(action), name="change the placement")
            self._acting[task] = action
            task.add_done_callback(self._acting.pop)

    def _view(self, now_s: float, busy: set[str]) -> PlacementView:
        """Look at all devices that are not lost. Leave out the engines whose replicas are changing."""
        replicas, absent = [], set()
        present = {name: device for name, device in self._devices.items() if not device.lost}
        for name in [name for name in self._called_s if device_of(name) not in present]:
            del self._called_s[name]  # its time without requests begins anew
        for device in present.values():
            for name, engine in device.engines.items():
                may_change = now_s >= self._refused_until_s.get(name, 0)
                if engine.state in _AWAY:
                    self._called_s.pop(name, None)
                    if engine.state is EngineState.ABSENT and may_change:
                        absent.add(name)
                else:
                    in_flight, idle_s = engine.usage.in_flight, self._idle_s(name, now_s)
                    replicas.append(
                        ReplicaView(name, engine_of(name), device.name, in_flight, idle_s, engine.is_ready, may_change)
                    )
        load = load_of(present, replicas)
        mean = sum(load.values()) / max(len(load), 1)
        changing = {name for action in self._acting.values() for name in _devices_of(action)}
        devices = {
            name: DeviceLoad(
                _free_bytes(device),
                self._above.lasted_s(name, load[name] > mean, now_s),
                self._below.lasted_s(name, load[name] <= mean, now_s),
                name in changing,
            )
            for name, device in present.items()
        }
        ranges = {name: self._range(name, absent, len(present)) for name in self.bounds if name not in busy}
        engines = {name: found for name, found in ranges.items() if found is not None}
        return PlacementView(replicas, engines, devices)

    def _idle_s(self, name: str, now_s: float) -> float:
        usage = self._devices[device_of(name)].engines[name].usage
        if usage.in_flight or usage.arrived != self._arrived.get(name) or name not in self._called_s:
            self._called_s[name], self._arrived[name] = now_s, usage.arrived
        return now_s - self._called_s[name]

    def _range(self, engine: str, absent: set[str], devices: int) -> EngineRange | None:
        """Return how many replicas an engine can have, and where. None if no device that is present fits it."""
        names = [replica_name(engine, device) for device in self._devices]
        known = [each for name in names if (each := self._devices[device_of(name)].engines.get(name)) is not None]
        if not known:
            return None
        # An absent replica says how long a start takes. One that sleeps says how long it takes to wake.
        replica = next((each for each in known if each.state is EngineState.ABSENT), known[0])
        least, most = self.bounds[engine]
        return EngineRange(
            min(least, devices),
            min(most, devices),
            replica.limits.smallest_bytes,
            replica.stats().wake_s,
            frozenset(device_of(name) for name in names if name in absent),
        )

    async def _act(self, action: Action) -> None:
        """Add a replica, then remove one, so that there are never too few."""
        began_s, error = time.monotonic(), None
        added = replica_name(*action.add) if action.add else None
        try:
            if added is not None:
                changing = added
                await self._devices[device_of(added)].add(added)
            if action.remove is not None:
                changing = action.remove
                await self._devices[device_of(action.remove)].remove(action.remove)
        except EngineError as failure:
            error = str(failure)
            if not self._devices[device_of(changing)].lost:
                self._refused_until_s[changing] = asyncio.get_running_loop().time() + AGAIN_S
        if action.add is not None:
            self._below.forget(action.add[1])  # its load changes now
        self._note(Change(time.time(), added, action.remove, action.reason, time.monotonic() - began_s, error))

    def _note(self, change: Change) -> None:
        self.changes.append(change)
        parts = (("add", change.added), ("remove", change.removed))
        what = ", ".join(f"{word} {name}" for word, name in parts if name)
        failed = f"; failed: {change.error}" if change.error else ""
        logging.getLogger(__name__).info("placement: %s (%s)%s", what, change.reason, failed)
        if self._log is not None:
            with suppress(OSError), self._log.open("a") as file:
                file.write(json.dumps(asdict(change)) + "\n")


class _Durations:
    """For how long conditions have held without a break, by name."""

    def __init__(self) -> None:
        self._since_s: dict[str, float] = {}

    def lasted_s(self, name: str, holds: bool, now_s: float) -> float:
        """Note whether a condition holds now, and return for how long it has."""
        if not holds:
            self.forget(name)
            return 0.0
        return now_s - self._since_s.setdefault(name, now_s)

    def forget(self, name: str) -> None:
        """Count anew from the next time that the condition is found to hold."""
        self._since_s.pop(name, None)


def _free_bytes(device: DeviceHandle) -> int:
    """Return what a device has left if all its engines shrink to their floors, and all that sleep are awake."""
    held = device.sharing.ledger.held
    needed_bytes = sum(
        held.get(name, 0) if engine.state in _AWAY else engine.limits.smallest_bytes
        for name, engine in device.engines.items()
    )
    return device.sharing.ledger.budget_bytes - needed_bytes - device.sharing.reserved_bytes


def _engines_of(action: Action) -> Sequence[str]:
    return [name for name in (action.add and action.add[0], action.remove and engine_of(action.remove)) if name]


def _devices_of(action: Action) -> Sequence[str]:
    added, removed = action.add and action.add[1], action.remove and device_of(action.remove)
    return [name for name in (added, action.relieves, removed) if name]
