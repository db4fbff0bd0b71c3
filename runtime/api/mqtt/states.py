"""Retained MQTT topics: the latest state of roles, engines and the device, and the latest decision."""

from collections.abc import Mapping

from pydantic_core import to_json

from runtime.api.monitor import DecisionShown, Monitor
from runtime.api.mqtt.connection import Connection, raise_if_cancelled
from runtime.api.mqtt.messages import GrantState, RoleState, Topics
from runtime.control.snapshot import DeviceMoment
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
                engine=seat.engine, state=monitor.states.get(seat.engine), now=engines.get(seat.engine)
            )
            for seat in self._team.seats.values()
        }
        for name, moment in engines.items():
            states[topics.grant(name)] = GrantState(
                gpu_memory_utilization=moment.share,
                kv_cache_bytes=moment.kv_cache_bytes,
                max_active_seqs=moment.max_active_seqs,
            )
        if sample:
            states[topics.device(0)] = sample.device
        if monitor.decisions:
            states[topics.decision] = monitor.decisions[-1]
        return states
