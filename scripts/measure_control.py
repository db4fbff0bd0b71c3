"""Measure what a tick of the controller costs. The figures are in runtime/control/README.md.

    python scripts/measure_control.py tick    microseconds per tick for 3 to 10,000 roles, for every policy

The real controller ticks over engines that answer at once: it takes a snapshot ("observe"), asks the contained policy
("decide"), resizes, writes the line of the decision log, and publishes to the service's monitor. Every engine has
requests in flight, and together they need more memory than there is.

Before each tick of "moves", every engine is resized at random, so that the policy changes almost every grant. Ticks of
"still" find the engines as the policy wants them. `moved` is the median fraction of the engines that a tick resized.

Times are processor time, which is all that such a tick needs; other load on the machine does not count. The slope is
that of a line fitted through the logarithms from 10 roles on: 1 is linear.
"""

import argparse
import asyncio
import gc
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from agents.role import Message
from runtime.api.monitor import Monitor
from runtime.control import catalogue
from runtime.control.contained_policy import ContainedPolicy
from runtime.control.controller import Controller
from runtime.control.decision_log import DecisionLog
from runtime.control.forecast import Forecast
from runtime.control.snapshotter import EngineRequirements, Snapshotter
from runtime.engines.fake import FakeEngine, FakeMemory
from runtime.engines.grant import Grant
from runtime.engines.handle import EngineState, EngineStats, Work
from runtime.engines.ledger import Ledger
from runtime.engines.request import GenerateRequest
from runtime.engines.sharing import Sharing

ROLES = (3, 10, 100, 1_000, 10_000)
MIB = 1 << 20
MEMORY = FakeMemory(device=1 << 50, fixed=1 << 30, floor=MIB, token=4096, block_tokens=128)
EACH_BYTES = 6 * MIB
REQUEST = GenerateRequest("", (Message("user", ""),), 0.0, 1.0, 1)
PARTS = ("observe", "decide", "resize", "log", "publish")
WARM_UP = 2
"""Ticks before the measured ones, which settle what the policy before left."""


class Still(FakeEngine):
    """An engine whose requests do not change: some are in flight, and `running` of them have one KV block each.

    The controller learns what its steps cost, because it completes one between two ticks.
    """

    def __init__(self, name: str, in_flight: int, running: int, open_requests: ExitStack) -> None:
        super().__init__(name, lambda request: "", memory=MEMORY, grant=grant(EACH_BYTES))
        self._active = min(running, in_flight)
        self._done = Work()
        for _ in range(in_flight):
            open_requests.enter_context(self.usage.request(REQUEST.rank(0)))

    def stats(self) -> EngineStats:
        size = self.limits.kv_cache_bytes(self.grant.gpu_memory_utilization)
        usage = self._active * self.limits.block_bytes / size  # at most 1: the floor is two blocks
        waiting = self.usage.in_flight - self._active
        return EngineStats(EngineState.READY, self.grant, size, self._active, waiting, usage, 0, 0, 0, 0, self._done)

    def step(self) -> None:
        """Complete a step, if requests run and admission is open."""
        if self._active and self.grant.max_active_seqs:
            self._done = self._done.plus(0.01, self._active, 0)


def grant(kv_cache_bytes: int) -> Grant:
    return Grant((MEMORY.fixed + kv_cache_bytes) / MEMORY.device, 64, 2048)


class Rig:
    """A controller whose loop does not run, over modelled engines.

    `parts` has the seconds that each part of the last tick took.
    """

    def __init__(self, roles: int, owned: ExitStack) -> None:
        self.rng = random.Random(roles)
        self.engines = {
            name: Still(name, self.rng.randint(0, 40), self.rng.randint(0, 2), owned)
            for name in (f"role-{number}" for number in range(roles))
        }
        self.sharing = Sharing(self.engines, Ledger(roles * (MEMORY.fixed + EACH_BYTES)))
        terms = {name: EngineRequirements(minimum_share=1 / roles) for name in self.engines}
        self.snapshotter = Snapshotter(self.engines, Forecast(), terms)
        self.monitor = Monitor(dict)
        folder = Path(owned.enter_context(tempfile.TemporaryDirectory()))
        self.log = owned.enter_context(DecisionLog(folder / "decisions.jsonl"))
        self.parts: dict[str, float] = defaultdict(float)

    async def start(self) -> None:
        """Start the engines, and add finished requests, so that every engine has an arrival rate."""
        for name, engine in self.engines.items():
            await engine.start()
            held_bytes = engine.limits.held_bytes(engine.grant.gpu_memory_utilization)
            self.sharing.ledger.claim(name, held_bytes)
        clock = asyncio.get_running_loop().time
        self.snapshotter.take(clock(), 0, 0)
        for engine in self.engines.values():
            count = self.rng.randint(1, 10**9)  # rates decay alike from here on, and stay above every policy's cap
            engine.usage.arrived += count
            engine.usage.finished += count

    def controller(self, policy: str) -> Controller:
        """Return a controller with a policy, whose parts are timed."""
        contained = ContainedPolicy(policy, catalogue.make(policy))
        controller = Controller(
            self.engines, self.sharing, self.snapshotter, contained, log=self.log, publish=self.monitor.record
        )
        self._time(self.snapshotter, "take", "observe")
        self._time(contained, "decide", "decide")
        self._time(self.sharing, "resize", "resize")
        self._time(self.log, "write", "log")
        controller._publish = self._timed(self.monitor.record, "publish")
        return controller

    def _time(self, owner: Any, method: str, part: str) -> None:
        function = getattr(type(owner), method).__get__(owner)
        setattr(owner, method, self._timed(function, part))

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @contextmanager
        def timing() -> Iterator[None]:
            started = time.process_time()
            yield
            self.parts[part] += time.process_time() - started

        async def asynchronous(*arguments: Any, **named: Any) -> Any:
            with timing():
                return await function(*arguments, **named)

        def synchronous(*arguments: Any, **named: Any) -> Any:
            with timing():
                return function(*arguments, **named)

        return asynchronous if asyncio.iscoroutinefunction(function) else synchronous

    async def disturb(self) -> None:
        """Give every engine a random size; together they fit the budget."""
        sizes = {name: self.rng.randrange(MIB, 2 * EACH_BYTES - MIB, MIB // 2) for name in self.engines}
        scale = min(1.0, len(sizes) * EACH_BYTES / sum(sizes.values()))
        await self.sharing.resize({name: grant(max(MIB, int(size * scale))) for name, size in sizes.items()})


async def measure(roles: int, repeats: int, record: dict[str, Any]) -> None:
    """Add the figures for a number of roles to the record, for every policy."""
    with ExitStack() as owned:
        rig = Rig(roles, owned)
        await rig.start()
        for policy in catalogue.names():
            controller = rig.controller(policy)
            for kind in ("moves", "still"):
                measured = await measure_ticks(rig, controller, repeats, disturbed=kind == "moves")
                for part, values in measured.items():
                    median = statistics.median(values)
                    figure = round(median, 3) if part == "moved" else round(median * 1e6, 1)
                    record[kind].setdefault(policy, {}).setdefault(part, {})[str(roles)] = figure
            print(f"{roles} roles, {policy}", file=sys.stderr, flush=True)


async def measure_ticks(rig: Rig, controller: Controller, repeats: int, disturbed: bool) -> dict[str, list[float]]:
    """Return the seconds of ticks and of their parts, and the fraction of engines that each one moved."""
    measured = defaultdict(list)
    for repeat in range(WARM_UP + repeats):
        if disturbed:
            await rig.disturb()
        for engine in rig.engines.values():
            engine.step()
        seconds, resized = await tick(rig, controller)
        if repeat < WARM_UP:
            continue
        measured["whole"].append(seconds)
        measured["moved"].append(resized / len(rig.engines))
        for part in PARTS:
            measured[part].append(rig.parts[part])
    return measured


async def tick(rig: Rig, controller: Controller) -> tuple[float, int]:
    """Return the seconds of one tick, and the number of engines that it resized."""
    rig.parts.clear()
    before = controller.counts.resizes
    gc.disable()
    started = time.process_time()
    await controller.tick()
    seconds = time.process_time() - started
    gc.enable()
    if controller.counts.faults or controller.counts.rejected:
        raise RuntimeError(f"a tick had a fault or a rejected grant: {controller.counts}")
    return seconds, controller.counts.resizes - before


def slope(figures: dict[str, float]) -> float:
    """Return the slope of log(time) over log(roles), from 10 roles on."""
    points = [(math.log(int(roles)), math.log(max(value, 0.1))) for roles, value in figures.items() if int(roles) >= 10]
    return round(statistics.linear_regression(*zip(*points, strict=True)).slope, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tick"])
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="number of measured ticks with 10,000 roles; twice as many with 1,000, ten times with fewer",
    )
    parser.add_argument("--json", action="store_true", help="print the record as one line of JSON")
    options = parser.parse_args()
    record: dict[str, Any] = {"moves": {}, "still": {}}
    for roles in ROLES:
        asyncio.run(measure(roles, options.repeats * max(1, min(10, 2_000 // roles)), record))
    for policies in record.values():
        for figures in policies.values():
            for part in ("whole", *PARTS):
                figures[part]["slope"] = slope(figures[part])
    print(json.dumps(record) if options.json else json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
