"""What a policy sees: the engines and their device at one moment. Plain data, which goes to the decision log as it
is."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from runtime.engines.grant import EngineLimits, Grant


@dataclass(frozen=True)
class EngineView:
    """One engine as a policy sees it. Counts are of requests; bytes and tokens are of its KV cache.

    `in_flight` have come and not ended: `running` of them in the engine, the others waiting. `peak_in_flight` is the
    most that there were lately, sinking slowly to what there is. `soon` will follow on what
    runs now in any engine, and `coming` are all that the jobs under way will still make, `soon` among them;
    both are expectations. `sequence_bytes` is what one sequence takes, `reply_tokens` what it writes, on average.
    `priority` 1 is the most urgent; `minimum_share` is of the memory that can move.
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
    sequence_bytes: float = 0.0
    priority: int = 1
    minimum_share: float | None = None
    slo_s: float | None = None

    @property
    def waiting(self) -> int:
        """Requests that have come and do not run."""
        return max(self.in_flight - self.running, 0)


@dataclass(frozen=True)
class EngineMoment:
    """What is shown and kept of an engine at a moment: its share of the device, bytes of KV cache, counts of requests,
    and how many it may run at once."""

    share: float
    kv_cache_bytes: int
    kv_used_bytes: int
    running: int
    waiting: int
    max_active_seqs: int

    @classmethod
    def of(cls, view: EngineView) -> "EngineMoment":
        """As a policy saw it."""
        return cls(
            share=view.grant.gpu_memory_utilization,
            kv_cache_bytes=view.kv_cache_bytes,
            kv_used_bytes=view.kv_used_bytes,
            running=view.running,
            waiting=view.waiting,
            max_active_seqs=view.grant.max_active_seqs,
        )


@dataclass(frozen=True)
class DeviceView:
    """The engines' device as telemetry last saw it. `utilization` 0 to 1; None and empty where it does not say.

    `uuid` is that of the GPU or MIG instance; see DeviceReading. `fault` also says that telemetry does not list the
    device that the engines run on; then there are no figures.
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
    """Engines by name, what they may hold together (bytes, all included), and the time in seconds.

    `movable_bytes` is the part of the budget that the engines' KV caches share: what is left once everything that they
    hold besides is taken off.
    """

    now_s: float
    budget_bytes: int
    engines: Mapping[str, EngineView]
    device: DeviceView = DeviceView()

    @cached_property
    def views(self) -> tuple[EngineView, ...]:
        """The engines in order."""
        return tuple(self.engines.values())

    @cached_property
    def movable_bytes(self) -> int:
        """What the KV caches share."""
        return self.budget_bytes - sum([view.limits.fixed_bytes for view in self.views])
