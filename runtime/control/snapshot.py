"""The view of a policy: the engines and their device at one moment. The decision log stores these values unchanged."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from runtime.control.costs import PRIOR, PRIOR_LANES, StepCost
from runtime.engines.grant import EngineLimits, Grant


@dataclass(frozen=True)
class EngineView:
    """One engine as a policy sees it. Counts are of requests; bytes are of its KV cache.

    - `in_flight`: requests that have arrived and not ended. `running` of them are in the engine, the others wait.
    - `peak_in_flight`: the recent maximum of `in_flight`, which decays slowly towards it.
    - `soon`: requests expected to follow directly on those running now in any engine.
    - `coming`: all requests that the current jobs are still expected to make, including `soon`.
    - `preemptions`: count since the engine started.
    - `oldest_wait_s`: waiting time of the oldest request that does not run, in seconds; 0 if none waits.
    - `oldest_job_s`: time since the oldest job with such a request began, in seconds; 0 if none waits.
    - `sequence_bytes`: average KV cache of one sequence.
    - `reply_tokens`: average length of recent replies; 0 if none has ended.
    - `paused_s`: for how long its admission has been paused, in seconds; 0 if it is not. A pause that ends while
      requests wait counts until one of them runs.
    - `stalled_s`: for how long it has completed no step although it has requests that run or that it could admit, in
      seconds.
    - `unanswered_s`: for how long it has had requests and has completed no reply, in seconds.
    - `cost`: what its steps cost.
    - `prompt_ratio`: how many prompt tokens its steps computed recently for each sequence in a step.
    - `utilization`: the part of the time in which it used the device, as NVML reports it for its process; None if
      telemetry does not report it.
    - `priority`: 1 is the most urgent.
    - `minimum_share`: of the memory that can move; None if not configured.
    - `jct_slo_s`, `slo_s`, `ttft_slo_s`, `tpot_slo_s`: the tightest objectives of its roles for the duration of a job
      and of a call, the time to a call's first token, and the time between two tokens, in seconds; None if not
      configured.
    """

    name: str
    limits: EngineLimits
    grant: Grant
    kv_cache_bytes: int
    kv_used_bytes: int
    in_flight: int = 0
    peak_in_flight: float = 0.0
    running: int = 0
    soon: float = 0.0
    coming: float = 0.0
    arrivals_per_s: float = 0.0
    completions_per_s: float = 0.0
    preemptions: int = 0
    oldest_wait_s: float = 0.0
    oldest_job_s: float = 0.0
    sequence_bytes: float = 0.0
    reply_tokens: float = 0.0
    paused_s: float = 0.0
    stalled_s: float = 0.0
    unanswered_s: float = 0.0
    cost: StepCost = PRIOR
    prompt_ratio: float = 0.0
    utilization: float | None = None
    priority: int = 1
    minimum_share: float | None = None
    jct_slo_s: float | None = None
    slo_s: float | None = None
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None

    @property
    def waiting(self) -> int:
        """Requests that have arrived and do not run."""
        return max(self.in_flight - self.running, 0)


@dataclass(frozen=True)
class EngineMoment:
    """One engine at one moment, as it is displayed and recorded.

    `share` is of the device, and `running` and `waiting` count requests. `max_active_seqs` is how many may run at once;
    0 means that admission is paused. EngineView describes the other fields.
    """

    share: float
    kv_cache_bytes: int
    kv_used_bytes: int
    running: int
    waiting: int
    max_active_seqs: int
    paused_s: float = 0.0
    cost: StepCost = PRIOR
    utilization: float | None = None

    @classmethod
    def of(cls, view: EngineView) -> "EngineMoment":
        """Summarize an engine's view."""
        return cls(
            share=view.grant.gpu_memory_utilization,
            kv_cache_bytes=view.kv_cache_bytes,
            kv_used_bytes=view.kv_used_bytes,
            running=view.running,
            waiting=view.waiting,
            max_active_seqs=view.grant.max_active_seqs,
            paused_s=view.paused_s,
            cost=view.cost,
            utilization=view.utilization,
        )


@dataclass(frozen=True)
class DeviceView:
    """The engines' device in telemetry's latest reading. Values that telemetry does not report are None or empty.

    `utilization` is from 0 to 1. `foreign_bytes` is what other processes hold on a GPU. `uuid` is that of the GPU or
    MIG instance (see DeviceReading). `fault` says why figures are missing or old; if telemetry does not list the
    engines' device, there are no figures.
    """

    kind: str = "host"
    name: str = ""
    total_bytes: int = 0
    used_bytes: int = 0
    utilization: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    foreign_bytes: int = 0
    fault: str | None = None
    uuid: str = ""


@dataclass(frozen=True)
class Snapshot:
    """The engines by name, their common budget in bytes (everything that they hold included), and the time in seconds.

    Only engines that can take a grant now are in it. `lanes` is how many of them the device serves at full speed at
    once; `lanes_confidence` is the measured part of that estimate, from 0 (assumed) to 1. See `costs`.
    """

    now_s: float
    budget_bytes: int
    engines: Mapping[str, EngineView]
    device: DeviceView = DeviceView()
    lanes: float = PRIOR_LANES
    lanes_confidence: float = 0.0

    @cached_property
    def views(self) -> tuple[EngineView, ...]:
        """The engines in order."""
        return tuple(self.engines.values())

    @cached_property
    def movable_bytes(self) -> int:
        """The part of the budget that the KV caches share: what the engines hold besides is subtracted."""
        return self.budget_bytes - sum([view.limits.fixed_bytes for view in self.views])


@dataclass(frozen=True)
class DeviceMoment(DeviceView):
    """The engines' device at one moment, as it is displayed, with the lanes of its snapshot."""

    lanes: float = PRIOR_LANES
    lanes_confidence: float = 0.0

    @classmethod
    def of(cls, snapshot: Snapshot) -> "DeviceMoment":
        """Add the lanes of a snapshot to its device."""
        return cls(**vars(snapshot.device), lanes=snapshot.lanes, lanes_confidence=snapshot.lanes_confidence)
