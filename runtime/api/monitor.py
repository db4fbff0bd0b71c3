"""The recent history of a running service, which HTTP, MQTT and the page display."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from runtime.control.decision_log import Record
from runtime.control.snapshot import DeviceMoment, EngineMoment, EngineView, Snapshot
from runtime.engines.grant import Grant
from runtime.engines.handle import EngineState
from runtime.events import EngineChanged, Event

SAMPLE_S = 0.5
"""Least seconds between two samples."""
SAMPLES = 1200
"""Samples that are kept: ten minutes."""
DECISIONS = 200
"""Decisions that are kept."""


@dataclass(frozen=True)
class Sample:
    """The service at one moment: its engines, its devices, and its jobs by state. `at` is in seconds since 1970."""

    at: float
    engines: Mapping[str, EngineMoment]
    devices: Mapping[str, DeviceMoment]
    jobs: Mapping[str, int]


@dataclass(frozen=True)
class DecisionShown:
    """A decision that changed a grant, or a fault: the policy, the cause, and each engine's grant with its reason.

    `at` is in seconds since 1970; `seconds` is how long the decision took to apply.
    """

    number: int
    at: float
    policy: str
    cause: str
    engines: Mapping[str, Mapping[str, Any]]
    moved_bytes: int
    seconds: float
    fault: str | None


class Monitor:
    """A listener of the controllers and the engines that keeps samples of the last ten minutes and the last decisions.

    `jobs` returns the number of jobs by state.
    """

    def __init__(self, jobs: Callable[[], Mapping[str, int]]) -> None:
        self.states: dict[str, EngineState] = {}
        self.samples: deque[Sample] = deque(maxlen=SAMPLES)
        self.decisions: deque[DecisionShown] = deque(maxlen=DECISIONS)
        self._jobs = jobs
        self._snapshots: dict[str, Snapshot] = {}
        self._last_number = 0
        self._changed = asyncio.Event()

    def on_event(self, event: Event) -> None:
        """Note an engine's new state. This is a listener of events."""
        if isinstance(event, EngineChanged):
            self.states[event.engine] = event.state
            self._announce()

    def record(self, record: Record) -> None:
        """Keep a decision of a controller, and a sample if one is due."""
        now = time.time()
        self._snapshots[record.device] = record.snapshot
        if record.fault is not None or record.outcomes:
            self._last_number += 1
            self.decisions.append(_shown(record, self._last_number, now))
        if not self.samples or now - self.samples[-1].at >= SAMPLE_S:
            views = {name: view for each in self._snapshots.values() for name, view in each.engines.items()}
            engines = {name: engine_moment(view) for name, view in views.items()}
            devices = {name: device_moment(snapshot) for name, snapshot in self._snapshots.items()}
            self.samples.append(Sample(now, engines, devices, dict(self._jobs())))
            self._announce()

    async def wait_for_change(self) -> None:
        """Wait until there is a new sample or an engine changes its state."""
        await self._changed.wait()

    def _announce(self) -> None:
        """Wake the current waiters; later ones wait for the next change."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def engine_moment(view: EngineView) -> EngineMoment:
    """Return an engine's moment, rounded to the digits that are displayed."""
    moment = EngineMoment.of(view)
    cost = replace(
        view.cost,
        step_s=round(view.cost.step_s, 6),
        sequence_s=round(view.cost.sequence_s, 8),
        prompt_token_s=round(view.cost.prompt_token_s, 9),
        confidence=round(view.cost.confidence, 3),
    )
    return replace(moment, share=round(moment.share, 5), paused_s=round(moment.paused_s, 2), cost=cost)


def device_moment(snapshot: Snapshot) -> DeviceMoment:
    """Return the device's moment, rounded to the digits that are displayed."""
    return replace(
        DeviceMoment.of(snapshot),
        lanes=round(snapshot.lanes, 3),
        lanes_confidence=round(snapshot.lanes_confidence, 3),
    )


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
