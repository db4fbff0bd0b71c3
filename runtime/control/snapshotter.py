"""Takes snapshots: engine statistics, smoothed rates, the forecast, and the telemetry of the engines' device."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from runtime.control.costs import Costs, Utilization
from runtime.control.forecast import ExpectedRequests
from runtime.control.snapshot import DeviceView, EngineView, Snapshot
from runtime.engines.handle import SLEEPING, EngineHandle, EngineState, EngineStats
from runtime.telemetry.reading import DeviceReading, Reading

RATE_DECAY_S = 1.0
"""Seconds until the weight of a moment in an average rate has fallen to 1/e."""
PEAK_DECAY_S = 0.1
"""Seconds until a peak has fallen to 1/e."""
REPLIES = 64
"""Replies after which the length of a reply weighs 1/e of a new one."""
SEQUENCE_BYTES_WEIGHT = 0.1
"""Weight of the newest value in the running mean of `sequence_bytes`."""
SETTLED = (EngineState.READY, EngineState.ABSENT, EngineState.FAILED, *SLEEPING)
"""States in which an engine holds what it has claimed."""
HEADROOM = 0.02
"""Fraction of the device that the budget leaves free for allocations outside Troupe's control."""


@dataclass(frozen=True)
class EngineRequirements:
    """The requirements of an engine's roles, from the configuration; see EngineView for each field."""

    priority: int = 1
    minimum_share: float | None = None
    jct_slo_s: float | None = None
    slo_s: float | None = None
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None


@dataclass
class _History:
    """The record of an engine between snapshots: the last counts, and averages over time."""

    at_s: float
    stepped_at_s: float
    answered_at_s: float
    arrived: int
    finished: int
    answered: int
    arrivals_per_s: float = 0.0
    completions_per_s: float = 0.0
    sequence_bytes: float = 0.0
    peak_in_flight: float = 0.0
    completion_tokens: int = 0
    replies: float = 0.0
    tokens_of_replies: float = 0.0
    admits: bool = True
    paused_since_s: float | None = None
    steps: int = 0


class Snapshotter:
    """A source of snapshots that keeps the averages over time which a single look at an engine cannot give.

    `reading` returns the latest telemetry; without it, snapshots have no figures of the device.
    """

    def __init__(
        self,
        engines: Mapping[str, EngineHandle],
        forecast: ExpectedRequests,
        requirements: Mapping[str, EngineRequirements] | None = None,
        reading: Callable[[], Reading] | None = None,
    ) -> None:
        self._engines = engines
        self._forecast = forecast
        self._requirements = requirements or {}
        self._reading = reading
        self._history: dict[str, _History] = {}
        self._costs = Costs()
        self._uuids: set[tuple[str, ...]] = set()
        self._reachable_bytes: int | None = None

    def take(self, now_s: float, budget_bytes: int, held_bytes: int) -> Snapshot:
        """Return a snapshot of the engines that can take a grant now.

        `budget_bytes` is the most that all engines may hold together, `held_bytes` what they claim now. The snapshot's
        budget is smaller if another process has taken so much of the device that the full budget cannot be reached.
        """
        stats = {name: engine.stats() for name, engine in self._engines.items()}
        settled = all(each.state in SETTLED for each in stats.values())
        ready = {
            name: each for name, each in stats.items() if each.state is EngineState.READY and each.grant is not None
        }
        for name, history in self._history.items():
            if name not in ready:  # it restarts or sleeps, and is neither paused nor stalled
                history.stepped_at_s = history.answered_at_s = now_s
                history.paused_since_s = None
        if ready:
            self._uuids = {self._engines[name].limits.device_uuids for name in ready}
        device, processes = self._device(held_bytes)
        utilization = _utilization(device, processes, ready)
        calls = {name: self._engines[name].usage.in_flight for name in ready}
        self._costs.look(now_s, ready, calls, utilization)
        in_flight = self.in_flight()
        running = {name: min(stats.running / max(in_flight[name], 1), 1.0) for name, stats in ready.items()}
        soon, coming = self._forecast.soon(running), self._forecast.coming()
        views = {
            name: self._view(
                name,
                stats,
                now_s,
                in_flight[name],
                soon.get(name, 0.0),
                coming.get(name, 0.0),
                None if stats.pid is None else processes.get(stats.pid),
            )
            for name, stats in ready.items()
        }
        return Snapshot(
            now_s,
            self._reachable_budget(budget_bytes, held_bytes, device, settled),
            views,
            device,
            self._costs.lanes,
            self._costs.confidence,
        )

    def in_flight(self) -> dict[str, int]:
        """Return the requests of each engine, including those that are about to be sent to it."""
        open_calls = self._forecast.open_calls()
        return {name: max(engine.usage.in_flight, open_calls.get(name, 0)) for name, engine in self._engines.items()}

    def _reachable_budget(self, budget_bytes: int, held_bytes: int, device: DeviceView, settled: bool) -> int:
        """Return the part of the budget that the device has free or that the engines hold.

        While telemetry has a fault, the last known limit stays in force: memory that others had taken may still be
        taken. The limit does not rise while engines start or wake (`settled` is False): they have claimed memory that
        the device still counts as free.
        """
        if device.total_bytes and device.fault is None:
            free_bytes = device.total_bytes - device.used_bytes - int(HEADROOM * device.total_bytes)
            reachable_bytes = held_bytes + free_bytes
            if not settled and self._reachable_bytes is not None:
                reachable_bytes = min(reachable_bytes, self._reachable_bytes)
            self._reachable_bytes = reachable_bytes
        return budget_bytes if self._reachable_bytes is None else min(budget_bytes, self._reachable_bytes)

    def _view(
        self,
        name: str,
        stats: EngineStats,
        now_s: float,
        in_flight: int,
        soon: float,
        coming: float,
        utilization: float | None,
    ) -> EngineView:
        engine = self._engines[name]
        usage = engine.usage
        history = self._history.get(name)
        if history is None:
            history = self._history[name] = _History(now_s, now_s, now_s, usage.arrived, usage.finished, usage.answered)
        used_bytes = int(stats.kv_cache_usage * stats.kv_cache_bytes)
        decayed_peak = history.peak_in_flight * math.exp((history.at_s - now_s) / PEAK_DECAY_S)
        history.peak_in_flight = max(in_flight, decayed_peak)
        _update(history, engine, stats, now_s, used_bytes)
        waiting = usage.waiting(stats.running)
        assert stats.grant is not None
        return EngineView(
            name=name,
            limits=engine.limits,
            grant=stats.grant,
            # Not stats.kv_cache_bytes: that is less by a part of a block, so the sum would miss the budget.
            kv_cache_bytes=engine.limits.kv_cache_bytes(stats.grant.gpu_memory_utilization),
            kv_used_bytes=used_bytes,
            in_flight=in_flight,
            peak_in_flight=history.peak_in_flight,
            running=min(stats.running, in_flight),
            soon=soon,
            coming=coming,
            arrivals_per_s=history.arrivals_per_s,
            completions_per_s=history.completions_per_s,
            preemptions=stats.preemptions,
            oldest_wait_s=0.0 if waiting is None else now_s - waiting.arrived_s,
            oldest_job_s=0.0 if waiting is None else now_s - waiting.began_s,
            sequence_bytes=history.sequence_bytes,
            # A running request has generated half of its reply, on average.
            reply_tokens=history.tokens_of_replies / (history.replies + stats.running / 2) if history.replies else 0.0,
            paused_s=0.0 if history.paused_since_s is None else now_s - history.paused_since_s,
            stalled_s=now_s - history.stepped_at_s,
            unanswered_s=now_s - history.answered_at_s,
            cost=self._costs.cost(name),
            prompt_ratio=self._costs.prompt_ratio(name),
            utilization=utilization,
            **vars(self._requirements.get(name, EngineRequirements())),
        )

    def _device(self, held_bytes: int) -> tuple[DeviceView, Mapping[int, float]]:
        """Return telemetry's view of the device that the engines report to run on, and its use by each process."""
        if self._reading is None:
            return DeviceView(), {}
        reading = self._reading()
        # A host reading always counts: a GPU without memory of its own uses the host's.
        on_host = reading.kind == "host"
        uuids = next(iter(self._uuids)) or ("",) if len(self._uuids) == 1 else ()
        ours = [device for device in reading.devices if on_host or device.uuid in uuids]
        if not ours or len(ours) != (1 if on_host else len(uuids)):
            return DeviceView(kind=reading.kind, fault=reading.fault or self._mismatch(reading)), {}
        device = _as_one(ours)
        view = DeviceView(
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
        return view, (device.process_utilization or {}) if view.fault is None else {}

    def _mismatch(self, reading: Reading) -> str:
        """Return the fault of a reading that does not list exactly one device, or group, of the engines."""
        engines = (
            ", ".join(sorted({uuid for uuids in self._uuids for uuid in uuids})) or "a device that they do not name"
        )
        listed = ", ".join(device.uuid or device.name for device in reading.devices) or "no device"
        return f"the engines run on {engines}; telemetry lists {listed}; exactly one must be the engines' device"


def _as_one(group: list[DeviceReading]) -> DeviceReading:
    """Return GPUs that work as one device: the memory is that of the fullest, the utilization that of the busiest."""
    tightest = min(group, key=lambda device: device.free_bytes)
    if len(group) == 1:
        return tightest
    return replace(
        tightest,
        name=f"{len(group)} x {tightest.name}",
        utilization=_over(max, [device.utilization for device in group]),
        power_w=_over(sum, [device.power_w for device in group]),
        temperature_c=_over(max, [device.temperature_c for device in group]),
        fault=next((device.fault for device in group if device.fault), None),
        uuid=" ".join(device.uuid for device in group),
    )


def _utilization(
    device: DeviceView, processes: Mapping[int, float], engines: Mapping[str, EngineStats]
) -> Utilization | None:
    """Return the utilization of the engines' GPU; None without one.

    A processor's utilization says nothing about engines, because a host also computes other things than their steps.
    """
    if device.kind != "gpu" or device.fault is not None or device.utilization is None:
        return None
    own = [processes.get(stats.pid or 0) for stats in engines.values()]
    if any(used is None and stats.running for used, stats in zip(own, engines.values(), strict=True)):
        return Utilization(device.utilization)
    known = [used for used in own if used is not None]
    return Utilization(device.utilization, sum(known) if known else None)


def _over(combine: Callable[[list[float]], float], values: list[float | None]) -> float | None:
    """Combine the values that are known; None if one is not."""
    known = [value for value in values if value is not None]
    return combine(known) if len(known) == len(values) else None


def _update(history: _History, engine: EngineHandle, stats: EngineStats, now_s: float, used_bytes: int) -> None:
    """Update an engine's averages from its counters."""
    usage, running = engine.usage, stats.running
    admits = stats.grant is not None and stats.grant.max_active_seqs > 0
    if admits and (running or not usage.in_flight):
        history.paused_since_s = None
    elif not admits and history.paused_since_s is None:
        history.paused_since_s = now_s
    # The first step of a request counts no running request before it has ended.
    could_step = running or (admits and usage.in_flight)
    if not could_step or admits != history.admits or stats.work.steps != history.steps:
        history.admits, history.steps, history.stepped_at_s = admits, stats.work.steps, now_s
    if not usage.in_flight or usage.answered != history.answered:
        history.answered, history.answered_at_s = usage.answered, now_s
    if running and used_bytes:
        newest = max(used_bytes / running, engine.limits.block_bytes)
        mean = history.sequence_bytes or newest
        history.sequence_bytes = mean + SEQUENCE_BYTES_WEIGHT * (newest - mean)
    elif not history.sequence_bytes:  # no sequence seen yet: assume the floor, which holds one of full length
        history.sequence_bytes = float(engine.limits.kv_floor_bytes)
    elapsed_s = now_s - history.at_s
    if elapsed_s <= 0:
        return
    weight = 1 - math.exp(-elapsed_s / RATE_DECAY_S)
    arrived, finished = usage.arrived - history.arrived, usage.finished - history.finished
    fade = math.exp(-finished / REPLIES)
    new_tokens = max(stats.completion_tokens - history.completion_tokens, 0)  # a restarted engine counts from 0
    history.replies = fade * history.replies + finished
    history.tokens_of_replies = fade * history.tokens_of_replies + new_tokens
    history.completion_tokens = stats.completion_tokens
    history.arrivals_per_s += weight * (arrived / elapsed_s - history.arrivals_per_s)
    history.completions_per_s += weight * (finished / elapsed_s - history.completions_per_s)
    history.at_s, history.arrived, history.finished = now_s, usage.arrived, usage.finished
