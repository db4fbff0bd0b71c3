"""What a running service is like, now and lately, for whoever shows it: HTTP, MQTT, the page."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from runtime.control.decision_log import Record
from runtime.control.snapshot import DeviceView, EngineMoment, EngineView
from runtime.engines.grant import Grant
from runtime.engines.handle import EngineState
from runtime.events import EngineChanged, Event

SAMPLE_S = 0.5
"""Samples are no closer together."""
SAMPLES = 1200
DECISIONS = 200


@dataclass(frozen=True)
class Sample:
    """All of it at a moment, in seconds since 1970."""

    at: float
    engines: Mapping[str, EngineMoment]
    device: DeviceView
    jobs: Mapping[str, int]


@dataclass(frozen=True)
class DecisionShown:
    """A decision that changed something: which policy, why now, and each engine's grant with its reason."""

    number: int
    at: float
    policy: str
    cause: str
    engines: Mapping[str, Mapping[str, Any]]
    moved_bytes: int
    seconds: float
    fault: str | None


class Monitor:
    """Listens to the controller and to the engines; keeps the last ten minutes, in steps of half a second, and the last
    decisions. `jobs` says how many wait and are worked."""

    def __init__(self, jobs: Callable[[], Mapping[str, int]]) -> None:
        self.states: dict[str, EngineState] = {}
        self.samples: deque[Sample] = deque(maxlen=SAMPLES)
        self.decisions: deque[DecisionShown] = deque(maxlen=DECISIONS)
        self._jobs = jobs
        self._numbers = 0
        self._news = asyncio.Event()

    def hear(self, event: Event) -> None:
        """A listener: engines come and go."""
        if isinstance(event, EngineChanged):
            self.states[event.engine] = event.state
            self._tell()

    def record(self, record: Record) -> None:
        """Take note of a decision of the controller."""
        now = time.time()
        if record.fault is not None or record.outcomes:
            self._numbers += 1
            self.decisions.append(_shown(record, self._numbers, now))
        if not self.samples or now - self.samples[-1].at >= SAMPLE_S:
            engines = {name: _moment(view) for name, view in record.snapshot.engines.items()}
            self.samples.append(Sample(now, engines, record.snapshot.device, dict(self._jobs())))
            self._tell()

    async def news(self) -> None:
        """Return when there is a new sample, or an engine has changed."""
        await self._news.wait()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


def _moment(view: EngineView) -> EngineMoment:
    """With a share in digits that are worth sending."""
    moment = EngineMoment.of(view)
    return replace(moment, share=round(moment.share, 5))


def _shown(record: Record, number: int, at: float) -> DecisionShown:
    decision = record.decision
    grants: Mapping[str, Grant] = decision.grants if decision else {}
    reasons: Mapping[str, str] = decision.reasons if decision else {}
    return DecisionShown(
        number=number,
        at=at,
        policy=record.policy,
        cause=record.cause,
        engines={
            name: {
                "share": round(grant.gpu_memory_utilization, 5),
                "max_active_seqs": grant.max_active_seqs,
                "reason": reasons.get(name, ""),
                **({"outcome": dict(vars(record.outcomes[name]))} if name in record.outcomes else {}),
            }
            for name, grant in grants.items()
        },
        moved_bytes=record.moved_bytes,
        seconds=round(record.seconds, 4),
        fault=record.fault,
    )
