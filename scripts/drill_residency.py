"""Fault drill of residency: three real engines, of which two fit, sleep and wake under load and are killed at random.

    python scripts/drill_residency.py --sleeps 500

Every reply is compared with the one that the engine gives undisturbed. The result is printed as JSON.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from agents.role import Message
from runtime.control.forecast import Forecast
from runtime.engines import replicas
from runtime.engines.fleet import Fleet
from runtime.engines.handle import EngineState
from runtime.engines.replicas import Replicas
from runtime.engines.request import GenerateRequest
from runtime.engines.spec import EngineSpec
from runtime.engines.supervised import Patience
from runtime.residency import catalogue
from runtime.residency.call_times import CallTimes
from runtime.residency.keeper import Keeper
from scripts.measure import progress
from scripts.tiny_model import write_chat_model

NAMES = ("a", "b", "c")
PATIENCE = Patience(restarts=10_000, backoff_s=(0, *[0.1] * 50))
REQUESTS = 10
"""Different requests that the clients choose from."""
CLIENTS = 2
"""Clients of each engine. A client waits for its reply, pauses for half a second on average, and asks again."""
KILL_EVERY_S = 4.0
"""Pause between two kills, on average. A request that is in flight at three kills would be refused."""


Kill = Callable[[Fleet, random.Random], EngineState | None]
"""Kills an engine. Returns the state that the engine was in, or None if there was none to kill."""


@dataclass
class Outcome:
    """The counts of a drill, and the extremes that it saw.

    `kills_of_waking` are the kills of engines that were waking. `most_bytes` is the largest sum of the engines' claims
    and `most_processes` the most engine processes at one time. `slowest_s` is the longest time that a request took, the
    hold during a sleep included.
    """

    budget_bytes: int
    sleeps: int = 0
    wakes: int = 0
    kills: int = 0
    kills_of_waking: int = 0
    requests: int = 0
    wrong: int = 0
    most_bytes: int = 0
    most_processes: int = 0
    slowest_s: float = 0.0


def small_engine(folder: Path) -> EngineSpec:
    """Write a small model with random weights to a folder, and return an engine of it."""
    return EngineSpec(
        model=str(write_chat_model(folder / "chat")),
        gpu_memory_utilization=0.7,
        max_model_len=512,
        max_num_seqs=32,
        dtype="float32",
        enforce_eager=True,
    )


@asynccontextmanager
async def oversubscribed(folder: Path) -> AsyncIterator[Fleet]:
    """Start three engines on a device that holds two and a half of them. All sleep at first."""
    spec = small_engine(folder)
    async with Fleet({"a": spec}, folder, device_bytes=2 << 30) as fleet:
        needed_bytes = fleet.engines["a"].limits.smallest_bytes
    device_bytes = int(2.5 * needed_bytes)
    specs = dict.fromkeys(NAMES, spec)
    async with Fleet(specs, folder, device_bytes=device_bytes, patience=PATIENCE, one_at_a_time=True) as fleet:
        yield fleet


async def drill(fleet: Fleet, sleeps: int, seed: int = 1, kill: Kill | None = None) -> Outcome:
    """Send requests to all engines and kill engines until they have slept `sleeps` times. Return what happened."""
    kill = kill or kill_process
    rng, outcome = random.Random(seed), Outcome(fleet.sharing.ledger.budget_bytes)
    async with Keeper(fleet.engines, fleet.sharing, Forecast(), CallTimes(), catalogue.make("lru")) as keeper:
        served = replicas.gathered(fleet.engines)
        expected = [await _tokens(served["a"], number) for number in range(REQUESTS)]

        async def ask(engine: Replicas) -> None:
            while keeper.counts.sleeps < sleeps:
                await asyncio.sleep(rng.expovariate(2))
                number, began_s = rng.randrange(REQUESTS), time.monotonic()
                tokens = await _tokens(engine, number)
                outcome.wrong += tokens != expected[number]  # not in one line with the await: an update could be lost
                outcome.requests += 1
                outcome.slowest_s = max(outcome.slowest_s, time.monotonic() - began_s)

        async with asyncio.TaskGroup() as group:
            beside = [
                group.create_task(_kill_again(fleet, kill, rng, outcome)),
                group.create_task(_watch(fleet, keeper, outcome)),
            ]
            async with asyncio.TaskGroup() as clients:
                for engine in served.values():
                    for _ in range(CLIENTS):
                        clients.create_task(ask(engine))
            for task in beside:
                task.cancel()
        outcome.sleeps, outcome.wakes = keeper.counts.sleeps, keeper.counts.wakes
    return outcome


async def _tokens(engine: Replicas, number: int) -> list[int]:
    """Return the reply to one of the requests. Only the request's id differs between two calls."""
    words = random.Random(number).choices(["plan", "solve", "check", "seven", "twelve"], k=number + 1)
    prompt = (Message("user", " ".join(words)),)
    request = GenerateRequest(f"{number}/{time.monotonic_ns()}", prompt, 0.0, 1.0, 20 + 7 * number)
    return [token async for chunk in engine.generate(request) for token in chunk.token_ids]


async def _kill_again(fleet: Fleet, kill: Kill, rng: random.Random, outcome: Outcome) -> None:
    """Kill engines that serve, drain or wake, a random one each time."""
    while True:
        await asyncio.sleep(rng.uniform(0, 2 * KILL_EVERY_S))
        state = kill(fleet, rng)
        outcome.kills += state is not None
        outcome.kills_of_waking += state is EngineState.WAKING


def kill_process(fleet: Fleet, rng: random.Random) -> EngineState | None:
    """Kill the process of a random engine. Return the engine's state, or None if there was no process."""
    victims = processes()
    if not victims:
        return None
    victim = rng.choice(victims)
    states = {stats.pid: stats.state for stats in (engine.stats() for engine in fleet.engines.values())}
    with suppress(psutil.Error):  # it has just ended
        victim.kill()
    return states.get(victim.pid, EngineState.WAKING)  # until an engine has started, it does not know its process


async def _watch(fleet: Fleet, keeper: Keeper, outcome: Outcome) -> None:
    """Note the largest claims and the most processes, and report progress every 10 s."""
    reported_s = time.monotonic()
    while True:
        outcome.most_bytes = max(outcome.most_bytes, sum(fleet.sharing.ledger.held.values()))
        outcome.most_processes = max(outcome.most_processes, len(processes()))
        if time.monotonic() > reported_s + 10:
            reported_s = time.monotonic()
            progress(f"{keeper.counts.sleeps} sleeps, {outcome.kills} kills, {outcome.requests} requests")
        await asyncio.sleep(0.02)


def processes() -> list[psutil.Process]:
    """Return the engine processes that this process has started and that have not ended.

    A program that an engine starts has the engine's name for a moment. It does not count.
    """
    engines = {}
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if "EngineCore" in " ".join(child.cmdline()):
                engines[child.pid] = child, child.ppid()
    return [engine for engine, parent in engines.values() if parent not in engines]


async def _run(options: argparse.Namespace) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        progress("starting three engines")
        async with oversubscribed(Path(folder)) as fleet:
            return await drill(fleet, options.sleeps, options.seed)


def main() -> None:
    """Run the drill that the command line describes, and print its outcome as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sleeps", type=int, default=500, help="sleeps until the drill ends (default: 500)")
    parser.add_argument("--seed", type=int, default=1)
    print(json.dumps(asdict(asyncio.run(_run(parser.parse_args()))), indent=1))


if __name__ == "__main__":
    main()
