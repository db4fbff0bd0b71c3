"""The rule that adds replicas of engines to devices with little work, and removes unused ones.

It is pure: the same view gives the same actions. It remembers nothing: for how long a state has lasted is in the view.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

SLACK = 8
"""Devices whose loads differ by less than twice this many requests are left alone."""
RATIO = 2.0
"""A device is overloaded if its load is more than this many times that of the device with the least."""
PATIENCE = 3.0
"""An imbalance must have lasted for this many times as long as the new replica takes to start."""
LOOKED_AT = 8
"""For a busy device, as many of the idlest devices are tried."""
IDLE_S = 60.0
"""The rule removes a replica beyond the fewest after so many seconds without a request."""


@dataclass(frozen=True)
class ReplicaView:
    """A replica that is neither absent nor failed: its engine, its device, and its requests.

    `idle_s` says for how long it has had no request. It is `ready` unless it restarts or sleeps. It cannot be removed
    if that failed just before.
    """

    name: str
    engine: str
    device: str
    in_flight: int
    idle_s: float
    ready: bool = True
    can_be_removed: bool = True


@dataclass(frozen=True)
class EngineRange:
    """The bounds of an engine's replicas, what the smallest one needs, and how long it takes to start.

    `devices` are those on which another replica can be added.
    """

    least: int
    most: int
    needed_bytes: int
    start_s: float
    devices: frozenset[str]


@dataclass(frozen=True)
class DeviceLoad:
    """The room for a new replica on a device, and how its load compares with that of the others.

    `free_bytes` is what is left if all engines on it shrink to their floors. `above_s` and `below_s` say for how long
    its load has been above, or below, the mean of all devices. A device is `changing` while an action for it is carried
    out.
    """

    free_bytes: int
    above_s: float = 0.0
    below_s: float = 0.0
    changing: bool = False


@dataclass(frozen=True)
class PlacementView:
    """All replicas, the engines whose replicas may change, and the devices. All by name."""

    replicas: Sequence[ReplicaView]
    engines: Mapping[str, EngineRange]
    devices: Mapping[str, DeviceLoad]

    @cached_property
    def load(self) -> dict[str, int]:
        """The requests on each device."""
        return load_of(self.devices, self.replicas)

    @cached_property
    def count(self) -> dict[str, int]:
        """The replicas of each engine that has any."""
        count: dict[str, int] = {}
        for replica in self.replicas:
            count[replica.engine] = count.get(replica.engine, 0) + 1
        return count


def load_of(devices: Iterable[str], replicas: Iterable[ReplicaView]) -> dict[str, int]:
    """Return the requests on each device."""
    load = dict.fromkeys(devices, 0)
    for replica in replicas:
        load[replica.device] += replica.in_flight
    return load


@dataclass(frozen=True)
class Action:
    """A replica to add to a device, one to remove, or both: then the new one serves before the old one goes.

    `relieves` is the device that an added replica takes work from, if any.
    """

    add: tuple[str, str] | None
    remove: str | None
    reason: str
    relieves: str | None = None


def decide(view: PlacementView) -> list[Action]:
    """Return the actions to take now. O(N log N) of the numbers of replicas and devices.

    A new replica takes over a part of its engine's requests. It helps if a device has more than RATIO times the
    requests of another one plus twice SLACK. On the busy device, the engine with the most requests gains the most. The
    replica must fit the idle device. The imbalance must have lasted PATIENCE times as long as the replica takes to
    start, or it may end before the replica serves. An engine that has its maximum of replicas moves one instead, if the
    busy device has another busy engine. Without one, the move would only shift the load.

    The busiest device is relieved first, by the idlest one with room. Each engine gets at most one new replica at a
    time, and each device takes part in one action. An engine with fewer replicas than its least gets one, and one with
    more than its most loses one, as after an action of which one half has failed.
    """
    actions = _idle(view)
    actions += _surplus(view, {action.remove for action in actions}) + _missing(view)
    grown = {action.add[0] for action in actions if action.add}
    taken = {action.add[1] for action in actions if action.add} | {n for n, d in view.devices.items() if d.changing}
    on_device: dict[str, list[ReplicaView]] = {name: [] for name in view.devices}
    for replica in view.replicas:
        if replica.name not in {action.remove for action in actions}:
            on_device[replica.device].append(replica)
    by_load = sorted(view.devices, key=lambda name: view.load[name])
    for busy in reversed(by_load):
        candidates = [replica for replica in on_device[busy] if replica.engine not in grown]
        for idle in [name for name in by_load if name not in taken][:LOOKED_AT]:
            if busy in taken or view.load[busy] <= RATIO * view.load[idle] + 2 * SLACK:
                break
            action = _relieve(view, busy, idle, candidates)
            if action is not None and action.add is not None:
                actions.append(action)
                grown.add(action.add[0])
                taken |= {busy, idle}
                break
        if not by_load or view.load[busy] <= RATIO * view.load[by_load[0]] + 2 * SLACK:
            break
    return actions


def _idle(view: PlacementView) -> list[Action]:
    """Return the removals of replicas without a request for long, first of those that sleep. The fewest stay."""
    left, actions = dict(view.count), []
    for replica in sorted(view.replicas, key=lambda replica: replica.ready):
        bounds = view.engines.get(replica.engine)
        idle = replica.idle_s >= IDLE_S and replica.can_be_removed
        if bounds and left[replica.engine] > bounds.least and idle:
            left[replica.engine] -= 1
            actions.append(Action(None, replica.name, f"no request for {replica.idle_s:.0f} s"))
    return actions


def _surplus(view: PlacementView, removed: Collection[str | None]) -> list[Action]:
    """Return the removal of the least busy replica of each engine that has too many and loses none already."""
    actions = []
    leaving = {replica.engine for replica in view.replicas if replica.name in removed}
    for engine, bounds in view.engines.items():
        if engine in leaving:
            continue
        replicas = [each for each in view.replicas if each.engine == engine and each.can_be_removed]
        if view.count.get(engine, 0) > bounds.most and replicas:
            least_busy = min(replicas, key=lambda replica: replica.in_flight)
            actions.append(Action(None, least_busy.name, f"{view.count[engine]} replicas are more than {bounds.most}"))
    return actions


def _missing(view: PlacementView) -> list[Action]:
    """Return a new replica, on the idlest device with room, for each engine that has too few."""
    actions = []
    free_bytes = {name: device.free_bytes for name, device in view.devices.items() if not device.changing}
    for engine, bounds in view.engines.items():
        count = view.count.get(engine, 0)
        room = [name for name in bounds.devices if free_bytes.get(name, 0) >= bounds.needed_bytes]
        if count < bounds.least and room:
            idlest = min(room, key=lambda name: (view.load[name], name))
            free_bytes[idlest] -= bounds.needed_bytes
            actions.append(Action((engine, idlest), None, f"{count} replicas are fewer than {bounds.least}"))
    return actions


def _relieve(view: PlacementView, busiest: str, idlest: str, candidates: Sequence[ReplicaView]) -> Action | None:
    """Return the action that moves most work from a busy device to an idle one, or None if there is none."""
    load = view.load
    lasted_s = min(view.devices[busiest].above_s, view.devices[idlest].below_s)
    for replica in sorted(candidates, key=lambda replica: -replica.in_flight):
        bounds = view.engines.get(replica.engine)
        if (
            bounds is None
            or replica.in_flight <= SLACK
            or idlest not in bounds.devices
            or bounds.needed_bytes > view.devices[idlest].free_bytes
            or lasted_s < PATIENCE * bounds.start_s
        ):
            continue
        reason = (
            f"device {busiest} has {load[busiest]} requests ({replica.in_flight} of {replica.engine}) and device "
            f"{idlest} {load[idlest]}, for {lasted_s:.0f} s"
        )
        if view.count[replica.engine] < bounds.most:
            return Action((replica.engine, idlest), None, reason, busiest)
        if load[busiest] - replica.in_flight > SLACK and replica.can_be_removed:
            return Action((replica.engine, idlest), replica.name, reason, busiest)
    return None
