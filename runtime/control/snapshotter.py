"""Makes snapshots: what the engines say of themselves, smoothed where a moment says little, and what telemetry says."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from runtime.control.forecast import Forecast
from runtime.control.snapshot import DeviceView, EngineView, Snapshot
from runtime.engines.handle import EngineHandle, EngineState, EngineStats
from runtime.telemetry.reading import Reading

MEMORY_S = 1.0
"""How long a moment counts in a mean over time: seconds, until its weight has fallen to 1/e."""
PEAK_S = 0.1
"""How slowly a peak sinks: seconds until it is at 1/e."""
HEADROOM = 0.02
"""The part of a device that is to stay free for what nobody announces."""


@dataclass(frozen=True)
class Terms:
    """What a configuration says of an engine's roles: see EngineView."""

    priority: int = 1
    minimum_share: float | None = None
    slo_s: float | None = None


@dataclass
class _Seen:
    """One engine over time."""

    at_s: float
    arrived: int
    finished: int
    arrivals_per_s: float = 0.0
    completions_per_s: float = 0.0
    sequence_bytes: float = 0.0
    peak_in_flight: float = 0.0


class Snapshotter:
    """Looks at engines each time it is asked, and remembers what means over time need."""

    def __init__(
        self,
        engines: Mapping[str, EngineHandle],
        forecast: Forecast,
        terms: Mapping[str, Terms] | None = None,
        reading: Callable[[], Reading] | None = None,
    ) -> None:
        self._engines = engines
        self._forecast = forecast
        self._terms = terms or {}
        self._reading = reading
        self._seen: dict[str, _Seen] = {}
        self._uuids: set[str] = set()
        self._reachable_bytes: int | None = None

    def observe(self, now_s: float, budget_bytes: int, held_bytes: int) -> Snapshot:
        """The engines that can be granted anything now. Bytes: what they may hold together at most, and what they do.

        The budget is cut where the device has less free than that: a foreign process has taken it.
        """
        up = {
            name: stats
            for name, engine in self._engines.items()
            if (stats := engine.stats()).state is EngineState.READY and stats.grant is not None
        }
        in_flight = self.in_flight()
        running = {name: min(stats.running / max(in_flight[name], 1), 1.0) for name, stats in up.items()}
        soon, coming = self._forecast.soon(running), self._forecast.coming()
        views = {
            name: self._view(name, stats, now_s, in_flight[name], soon.get(name, 0.0), coming.get(name, 0.0))
            for name, stats in up.items()
        }
        if up:
            self._uuids = {self._engines[name].limits.device_uuid for name in up}
        device = self._device(held_bytes)
        if device.total_bytes and device.fault is None:
            free = device.total_bytes - device.used_bytes - int(HEADROOM * device.total_bytes)
            self._reachable_bytes = held_bytes + free
        if self._reachable_bytes is not None:  # also while telemetry is silent: what others took, they may still have
            budget_bytes = min(budget_bytes, self._reachable_bytes)
        return Snapshot(now_s, budget_bytes, views, device)

    def in_flight(self) -> dict[str, int]:
        """Requests that each engine has, or that are about to be sent to it."""
        opened = self._forecast.open_calls()
        return {name: max(engine.usage.in_flight, opened.get(name, 0)) for name, engine in self._engines.items()}

    def _view(
        self, name: str, stats: EngineStats, now_s: float, in_flight: int, soon: float, coming: float
    ) -> EngineView:
        engine = self._engines[name]
        usage = engine.usage
        seen = self._seen.get(name)
        if seen is None:
            seen = self._seen[name] = _Seen(now_s, usage.arrived, usage.finished)
        used = int(stats.kv_cache_usage * stats.kv_cache_bytes)
        seen.peak_in_flight = max(in_flight, seen.peak_in_flight * math.exp((seen.at_s - now_s) / PEAK_S))
        self._update(seen, engine, stats, now_s, used)
        assert stats.grant is not None
        terms = self._terms.get(name, Terms())
        return EngineView(
            name=name,
            limits=engine.limits,
            grant=stats.grant,
            # What its grant comes to: what backs it is less by a part of a block, and would not add up to the budget.
            kv_cache_bytes=engine.limits.kv_cache_bytes(stats.grant.gpu_memory_utilization),
            kv_used_bytes=used,
            in_flight=in_flight,
            peak_in_flight=seen.peak_in_flight,
            running=min(stats.running, in_flight),
            soon=soon,
            coming=coming,
            arrivals_per_s=seen.arrivals_per_s,
            completions_per_s=seen.completions_per_s,
            preemptions=stats.preemptions,
            oldest_wait_s=now_s - (now_s if (since_s := usage.waiting_since_s(stats.running)) is None else since_s),
            sequence_bytes=seen.sequence_bytes,
            priority=terms.priority,
            minimum_share=terms.minimum_share,
            slo_s=terms.slo_s,
        )

    def _update(self, seen: _Seen, engine: EngineHandle, stats: EngineStats, now_s: float, used: int) -> None:
        usage, running = engine.usage, stats.running
        if running and used:
            held = max(used / running, engine.limits.block_bytes)
            seen.sequence_bytes = (
                held if not seen.sequence_bytes else seen.sequence_bytes + 0.1 * (held - seen.sequence_bytes)
            )
        elif not seen.sequence_bytes:  # nothing seen yet: as long as its floor, which holds a sequence of full length
            seen.sequence_bytes = float(engine.limits.kv_floor_bytes)
        seconds = now_s - seen.at_s
        if seconds <= 0:
            return
        new = 1 - math.exp(-seconds / MEMORY_S)
        arrived, finished = usage.arrived - seen.arrived, usage.finished - seen.finished
        seen.arrivals_per_s += new * (arrived / seconds - seen.arrivals_per_s)
        seen.completions_per_s += new * (finished / seconds - seen.completions_per_s)
        seen.at_s, seen.arrived, seen.finished = now_s, usage.arrived, usage.finished

    def _device(self, held_bytes: int) -> DeviceView:
        """Return what telemetry says of the device that the engines say they run on."""
        if self._reading is None:
            return DeviceView()
        reading = self._reading()
        # The host is one device, and is also that of a GPU without memory of its own.
        ours = [device for device in reading.devices if reading.kind == "host" or device.uuid in self._uuids]
        if len(ours) != 1:
            return DeviceView(kind=reading.kind, fault=reading.fault or self._mismatch(reading))
        device = ours[0]
        return DeviceView(
            kind=reading.kind,
            name=device.name,
            total_bytes=device.total_bytes,
            used_bytes=device.used_bytes,
            utilization=device.utilization,
            power_w=device.power_w,
            temperature_c=device.temperature_c,
            foreign_bytes=max(device.used_bytes - held_bytes, 0) if reading.kind == "gpu" else 0,
            fault=reading.fault or device.fault,
            uuid=device.uuid,
        )

    def _mismatch(self, reading: Reading) -> str:
        """Say why no device is known to be that of the engines."""
        engines = ", ".join(sorted(self._uuids - {""})) or "a device that they do not name"
        listed = ", ".join(device.uuid or device.name for device in reading.devices) or "no device"
        return f"the engines run on {engines}; telemetry lists {listed}, and exactly one of these has to be theirs"
