"""The calls that the replicas on one device can expect, which are a part of those that their engines expect."""

import math
from collections.abc import Collection, Mapping

from runtime.control.forecast import Forecast
from runtime.engines.replicas import Replicas, engine_of
from runtime.residency.call_times import CallTimes


class ExpectedCalls:
    """The part of the team's forecast and call times that concerns some replicas.

    The replicas of an engine that serve share its calls equally. If none of them serves, all calls are expected at the
    one that requests wait for.
    """

    def __init__(
        self, names: Collection[str], replicas: Mapping[str, Replicas], forecast: Forecast, call_times: CallTimes
    ) -> None:
        self._names = names
        self._replicas = replicas
        self._forecast = forecast
        self._call_times = call_times

    def open_calls(self) -> dict[str, int]:
        """Return the calls that are due and not answered, by replica: see Forecast.open_calls."""
        calls = self._forecast.open_calls()
        return {name: math.ceil(calls.get(engine_of(name), 0) * self._part(name)) for name in self._names}

    def soon(self, running: Mapping[str, float]) -> dict[str, float]:
        """Return the calls expected to follow directly on those running now, by replica: see Forecast.soon.

        `running` is ignored, because it lacks the replicas on other devices.
        """
        del running
        open_calls = self._forecast.open_calls()
        calls = self._forecast.soon(
            {
                name: min(replicas.running / max(replicas.in_flight, open_calls.get(name, 0), 1), 1.0)
                for name, replicas in self._replicas.items()
            }
        )
        return {name: calls.get(engine_of(name), 0.0) * self._part(name) for name in self._names}

    def coming(self) -> dict[str, float]:
        """Return the calls that running jobs will make after their open ones, by replica: see Forecast.coming."""
        calls = self._forecast.coming()
        return {name: calls.get(engine_of(name), 0.0) * self._part(name) for name in self._names}

    def next_call_s(self, absent: Collection[str] = ()) -> dict[str, float]:
        """Return in how many seconds each replica will probably be called next: see CallTimes.next_call_s.

        `absent` is ignored for the reason that `soon` gives. Leave out replicas beside others that serve.
        """
        del absent
        times_s = self._call_times.next_call_s([name for name, each in self._replicas.items() if not each.serves])
        return {
            name: times_s[engine_of(name)] for name in self._names if engine_of(name) in times_s and self._part(name)
        }

    def lead_s(self) -> dict[str, float]:
        """Return how long after a job's beginning its first call of each replica comes: see CallTimes.lead_s."""
        lead_s = self._call_times.lead_s()
        return {name: lead_s[engine_of(name)] for name in self._names if engine_of(name) in lead_s}

    def _part(self, name: str) -> float:
        return self._replicas[engine_of(name)].part(name)
