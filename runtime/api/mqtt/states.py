"""Retained MQTT topics: the latest state of roles, engines and devices, and the latest decision."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pydantic_core import to_json

from runtime.api.monitor import DecisionShown, Monitor
from runtime.api.mqtt.connection import Connection, raise_if_cancelled
from runtime.api.mqtt.messages import GrantState, RoleState, Topics
from runtime.control.snapshot import DeviceMoment, EngineMoment
from runtime.engines.handle import EngineState
from runtime.engines.replicas import engine_of
from runtime.jobs.team import Team

State = RoleState | GrantState | DeviceMoment | DecisionShown


class States:
    """The publisher of states. It sends only the latest value of each topic, and only if the value has changed."""

    def __init__(self, topics: Topics, team: Team, monitor: Monitor) -> None:
        self._topics = topics
        self._team = team
        self._monitor = monitor

    async def publish_all(self, connection: Connection) -> None:
        """Publish each state now and after every change, until cancelled. Raises BrokerError."""
        published: dict[str, bytes] = {}
        while True:
            for topic, state in self._current().items():
                payload = to_json(state)
                if published.get(topic) != payload:
                    published[topic] = payload
                    await connection.publish(topic, payload, qos=0, retain=True)
                    raise_if_cancelled()
            await self._monitor.wait_for_change()

    def _current(self) -> Mapping[str, State]:
        """Return the state of every topic that has one."""
        monitor, topics = self._monitor, self._topics
        sample = monitor.samples[-1] if monitor.samples else None
        engines = sample.engines if sample else {}
        states: dict[str, State] = {
            topics.role(seat.name): RoleState(
                engine=seat.engine,
                state=_state([state for name, state in monitor.states.items() if engine_of(name) == seat.engine]),
                now=_together([moment for name, moment in engines.items() if engine_of(name) == seat.engine]),
            )
            for seat in self._team.seats.values()
        }
        for name, moment in engines.items():
            states[topics.grant(name)] = GrantState(
                gpu_memory_utilization=moment.share,
                kv_cache_bytes=moment.kv_cache_bytes,
                max_active_seqs=moment.max_active_seqs,
            )
        for name, device in (sample.devices if sample else {}).items():
            states[topics.device(name)] = device
        if monitor.decisions:
            states[topics.decision] = monitor.decisions[-1]
        return states


def _state(replicas: Sequence[EngineState]) -> EngineState | None:
    """Return the state of an engine: ready, if any of its replicas is."""
    if EngineState.READY in replicas:
        return EngineState.READY
    return replicas[0] if replicas else None


def _together(replicas: Sequence[EngineMoment]) -> EngineMoment | None:
    """Return an engine's moment over all its replicas. Costs and utilization are those of the first."""
    if len(replicas) < 2:
        return replicas[0] if replicas else None
    return replace(
        replicas[0],
        share=sum(each.share for each in replicas),
        kv_cache_bytes=sum(each.kv_cache_bytes for each in replicas),
        kv_used_bytes=sum(each.kv_used_bytes for each in replicas),
        running=sum(each.running for each in replicas),
        waiting=sum(each.waiting for each in replicas),
        max_active_seqs=sum(each.max_active_seqs for each in replicas),
        paused_s=min(each.paused_s for each in replicas),
    )
