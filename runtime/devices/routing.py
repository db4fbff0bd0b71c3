"""Chooses the replica for a request, by what the steps of the engines on each device cost."""

import math
from collections.abc import Mapping, Sequence

from runtime.control.costs import PRIOR
from runtime.devices.handle import DeviceHandle
from runtime.engines.handle import EngineHandle
from runtime.engines.replicas import device_of


class Router:
    """A function that chooses among the replicas of an engine that are ready."""

    def __init__(self, devices: Mapping[str, DeviceHandle]) -> None:
        self._devices = devices

    def __call__(self, ready: Sequence[EngineHandle]) -> EngineHandle:
        """Return the replica on whose device the request will wait least for each of its tokens."""
        return min(ready, key=lambda replica: self.round_s(replica.name))

    def round_s(self, replica: str) -> float:
        """Return how long a step of each engine that has requests takes together, if a replica gets one more request.

        Engines on one device take turns, so that this is the time until each request has its next token. An engine that
        has requests already shares its step with the new one. An engine without requests adds a whole step for all
        others on the device.
        """
        device = self._devices[device_of(replica)]
        costs = device.controller.snapshot.engines if device.controller.snapshot else {}
        seconds = 0.0
        for name, engine in device.engines.items():
            requests = engine.usage.in_flight + (name == replica)
            if requests:
                cost = costs[name].cost if name in costs else PRIOR
                seconds += cost.step_s + cost.sequence_s * requests
        # Requests beyond those that can run at once wait for others to end: for as many rounds more, on average.
        turns = math.ceil((device.engines[replica].usage.in_flight + 1) / device.engines[replica].limits.seqs_ceiling)
        return seconds * turns
