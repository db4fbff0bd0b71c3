"""Decides on which device each replica of each engine starts."""

from collections.abc import Collection, Mapping, Sequence

from runtime.engines.replicas import replica_name
from runtime.engines.spec import EngineSpec, ReplicaRange
from runtime.errors import ConfigError

Placement = dict[str, dict[str, EngineSpec]]
"""The specification of each replica, by the name of the device and then by the name of the replica."""


def place(
    engines: Mapping[str, EngineSpec],
    devices: Sequence[str],
    may_sleep: Collection[str] = (),
    more_devices_come: bool = False,
    gpus: Mapping[str, int] | None = None,
) -> Placement:
    """Place the replicas of engines on devices, of which no two replicas of one engine share one.

    The largest engines are placed first, each on the device with the most room left, so that all devices get about the
    same. An engine's size is the share of the device that it starts with. Those in `may_sleep` need not fit beside the
    others. `gpus` has the number of GPUs of each device that is a group; an engine fits only a device with as many as
    it needs.

    On a single device, a replica has the name of its engine, unless more devices can come. Raises ConfigError if an
    engine does not fit.
    """
    placed: Placement = {device: {} for device in devices}
    room, room_awake = dict.fromkeys(devices, 1.0), dict.fromkeys(devices, 1.0)
    for engine in sorted(engines, key=lambda name: -engines[name].gpu_memory_utilization):
        spec = engines[engine]
        share = spec.gpu_memory_utilization
        suitable = [device for device in devices if _fits(spec, device, gpus)]
        if not suitable:
            raise ConfigError(
                f"engines.{engine}.vllm.tensor_parallel_size: no device has {_count(spec.gpus)}; the devices are "
                f"{', '.join(devices)}; change it, or add such a device to devices, for example {[*range(spec.gpus)]}"
            )
        count, most = spec.replica_bounds(len(suitable))
        needed = count if more_devices_come else max(count, most)
        if needed > len(suitable):
            raise ConfigError(
                f"engines.{engine}.replicas: {needed} replicas need as many devices, but there are "
                f"{len(suitable)} ({', '.join(suitable)}); use fewer, or `all` for one on each device"
            )
        for device in sorted(suitable, key=lambda name: -room[name])[:count]:
            awake = 0.0 if engine in may_sleep else share
            if awake > room_awake[device] + 1e-9:
                raise ConfigError(
                    f"engines.{engine}: no device has room for another replica, which starts with "
                    f"{share:g} of a device; {_room(room_awake)}; lower gpu_memory_utilization or replicas of an engine"
                )
            room[device] -= share
            room_awake[device] -= awake
            alone = len(devices) == 1 and not more_devices_come
            placed[device][engine if alone else replica_name(engine, device)] = spec
    order = list(engines)
    for device, specs in placed.items():
        placed[device] = dict(sorted(specs.items(), key=lambda item: order.index(item[0].partition("@")[0])))
    return placed


def _fits(spec: EngineSpec, device: str, gpus: Mapping[str, int] | None) -> bool:
    return spec.gpus == (gpus or {}).get(device, 1)


def spares(engines: Mapping[str, EngineSpec], placed: Placement, gpus: Mapping[str, int] | None = None) -> Placement:
    """Return the replicas that can be added later: of engines with a range, on each device that has none of theirs."""
    movable = {engine: spec for engine, spec in engines.items() if isinstance(spec.replicas, ReplicaRange)}
    if len(placed) == 1:
        return {device: {} for device in placed}
    return others(movable, placed, gpus)


def others(engines: Mapping[str, EngineSpec], placed: Placement, gpus: Mapping[str, int] | None = None) -> Placement:
    """Return a replica of each engine for each device that it fits and that has none of its own. `gpus`: see place."""
    return {
        device: {
            name: spec
            for engine, spec in engines.items()
            if (name := replica_name(engine, device)) not in of_device and _fits(spec, device, gpus)
        }
        for device, of_device in placed.items()
    }


def _count(gpus: int) -> str:
    return "a single GPU" if gpus == 1 else f"{gpus} GPUs"


def _room(room: Mapping[str, float]) -> str:
    return "left are " + ", ".join(f"{max(left, 0):.2g} of device {device}" for device, left in room.items())
