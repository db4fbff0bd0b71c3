"""Chooses the replica for a request, by what the steps of the engines on each device cost."""

import math
from collections.abc import Mapping, Sequence

from runtime.control.costs import PRIOR
from runtime.control.snapshot import EngineView
from runtime.devices.handle import DeviceHandle
from runtime.engines.handle import EngineHandle
from runtime.engines.replicas import Home, device_of


class Router:
    """A function that chooses among the replicas of an engine that are ready."""

    def __init__(self, devices: Mapping[str, DeviceHandle]) -> None:
        self._devices = devices

    def __call__(self, ready: Sequence[EngineHandle], home: Home | None = None) -> EngineHandle:
        """Return the replica on whose device the request will wait least for each of its tokens.

        The replica that served its session last need not compute the prompt again. It gets the request if this saves
        more time than a reply of average length waits longer there.
        """
        best = min(ready, key=lambda replica: self.round_s(replica.name))
        if home is None or home.replica is best or home.replica not in ready:
            return best
        view = self._views(home.replica.name).get(home.replica.name)
        if view is None:
            return best
        saved_s = view.cost.prompt_token_s * home.prompt_tokens
        longer_s = self.round_s(home.replica.name) - self.round_s(best.name)
        return home.replica if longer_s * max(view.reply_tokens, 1.0) <= saved_s else best

    def _views(self, replica: str) -> Mapping[str, EngineView]:
        snapshot = self._devices[device_of(replica)].controller.snapshot
        return snapshot.engines if snapshot is not None else {}

    def round_s(self, replica: str) -> float:
        """Return how long a step of each engine that has requests takes together, if a replica gets one more request.

        Engines on one device take turns, so that this is the time until each request has its next token. An engine that
        has requests already shares its step with the new one. An engine without requests adds a whole step for all
        others on the device.
        """
        device = self._devices[device_of(replica)]
        costs = self._views(replica)
        seconds = 0.0
        for name, engine in device.engines.items():
            requests = engine.usage.in_flight + (name == replica)
            if requests:
                cost = costs[name].cost if name in costs else PRIOR
                seconds += cost.step_s + cost.sequence_s * requests
        # Requests beyond those that can run at once wait for others to end: for as many rounds more, on average.
        turns = math.ceil((device.engines[replica].usage.in_flight + 1) / device.engines[replica].limits.seqs_ceiling)
        return seconds * turns
