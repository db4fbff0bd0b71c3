"""Measure a cluster of Ray nodes on this machine, over modelled engines. The figures are in runtime/cluster/README.md.

    python scripts/measure_cluster.py calls              what a call through an agent costs, beside one in this process
    python scripts/measure_cluster.py losses [--times N] how soon replies go on after the loss of an agent, or of a node

`losses` also checks that every reply is whole.
"""

import argparse
import asyncio
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from agents.role import Message
from runtime import logs
from runtime.assembly import RunningTeam, start_team
from runtime.cluster.agent import MakeAgent
from runtime.config import Config
from runtime.engines.replicas import device_of
from runtime.engines.request import GenerateRequest
from runtime.jobs.team import assemble
from runtime.simulation.assembly import start_modelled_team
from runtime.simulation.modelled_agent import modelled_agent
from scripts.measure import spread
from scripts.ray_machines import Machines, on_cluster

STREAMS = 64
STEP_S = 0.02
TOKENS = 150


def words(request: GenerateRequest) -> str:
    """Reply with as many words as are asked for, the same for the same request."""
    return " ".join(f"w{number}" for number in range(int(request.messages[-1].content)))


def ask(tokens: int, name: str) -> GenerateRequest:
    """Return a request for this many words."""
    return GenerateRequest(name, (Message("user", str(tokens)),), 0.0, 1.0, None)


@contextmanager
def constants(step_s: float) -> Iterator[str]:
    """Yield the path of constants for engines with steps of this length, whatever is in them."""
    engine = {"step_s": step_s, "token_s": 0, "block_bytes": 16 << 10, "block_tokens": 16, "max_num_seqs": 256}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump({"lanes": 64, "engines": dict.fromkeys(("planner", "solver", "critic"), engine)}, file)
        file.flush()
        yield file.name


@asynccontextmanager
async def team_on(config: Config, make_agent: MakeAgent) -> AsyncIterator[RunningTeam]:
    """Start the embedded team on a cluster, over the engines of these agents."""
    with tempfile.TemporaryDirectory() as folder:
        async with start_team(config, assemble(config), Path(folder), make_agent=make_agent) as running:
            yield running


async def calls() -> None:
    """Compare calls through an agent with calls in this process."""
    rows: dict[str, dict[str, Any]] = {}
    with Machines("a") as machines, constants(1e-9) as fast, constants(STEP_S) as slow:
        for name, scale, model in (("at once", 0.0, fast), ("streams", 1.0, slow)):
            agent = partial(modelled_agent, time_scale=scale, model=model, script=words)
            async with team_on(on_cluster(machines.address), agent) as running:
                rows.setdefault("through an agent", {})[name] = await _calls(running, name)
            found = on_cluster(machines.address).model_copy(update={"cluster": None})
            async with start_modelled_team(
                found, assemble(found), time_scale=scale, model=model, script=words
            ) as running:
                rows.setdefault("in this process", {})[name] = await _calls(running, name)
    print(json.dumps(rows, indent=2))


async def _calls(running: RunningTeam, name: str) -> Any:
    if name == "at once":
        alone = await _timed(running, 1, 500)
        many = await _timed(running, STREAMS, 6000)
        return {
            "1 call at a time: p50, p99, ms": [1000 * statistics.median(alone), 1000 * _quantile(alone, 0.99)],
            f"{STREAMS} at a time: calls/s": 6000 / many[-1],
        }
    began_s = time.monotonic()
    gaps: list[float] = []
    await asyncio.gather(*(_streamed(running, 200, f"s{number}", gaps) for number in range(STREAMS)))
    seconds = time.monotonic() - began_s
    return {
        "chunks/s": 200 * STREAMS / seconds,
        "between chunks: p50, p99, ms": [1000 * _quantile(gaps, q) for q in (0.5, 0.99)],
    }


async def _timed(running: RunningTeam, at_once: int, total: int) -> list[float]:
    """Return the seconds of each call, and of all calls as the last value."""
    numbers, taken = iter(range(total)), []

    async def work() -> None:
        for number in numbers:
            began_s = time.monotonic()
            await _streamed(running, 8, f"c{number}", [])
            taken.append(time.monotonic() - began_s)

    await asyncio.gather(*(work() for _ in range(2)))  # nothing is left; a warm-up of the loop
    taken.clear()
    numbers = iter(range(total))
    began_s = time.monotonic()
    await asyncio.gather(*(work() for _ in range(at_once)))
    return [*taken, time.monotonic() - began_s]


async def _streamed(running: RunningTeam, tokens: int, name: str, gaps: list[float]) -> str:
    text, last_s = "", None
    async for chunk in running.generate("solver", ask(tokens, name)):
        now_s = time.monotonic()
        if last_s is not None:
            gaps.append(now_s - last_s)
        last_s = now_s
        text += chunk.text
    return text


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[int(q * (len(values) - 1))]


async def losses(times: int) -> None:
    """Kill and freeze agents and nodes while replies are streamed."""
    resumed_s: dict[str, list[float]] = {"agent killed": [], "node killed": [], "node frozen": []}
    with Machines("a", "b") as machines, constants(STEP_S) as model:
        agent = partial(modelled_agent, model=model, script=words)
        async with team_on(on_cluster(machines.address), agent) as running:
            for number in range(times):
                for kind, taken in resumed_s.items():
                    taken.append(await _loss(machines, running, kind, f"{kind} {number}"))
                    print(f"{kind}: resumed after {taken[-1]:.2f} s", file=sys.stderr)
    print(json.dumps({kind: spread(taken) for kind, taken in resumed_s.items()}, indent=2, default=str))


async def _loss(machines: Machines, running: RunningTeam, kind: str, name: str) -> float:
    """Lose a node under 32 replies. Return the seconds until the first reply of it goes on elsewhere."""
    await _until(lambda: all(len(_serving(running, node)) == 1 for node in "ab"))
    victim = running.engines["solver@a:0"]
    began_s = 0.0
    resumed: list[float] = []
    texts: list[str] = []

    async def one(number: int) -> None:
        text, mine = "", False
        async for chunk in running.generate("solver", ask(TOKENS, f"{name} {number}")):
            if began_s and mine and victim.stats().state == "lost":
                resumed.append(time.monotonic())
                mine = False
            if not began_s:
                mine = True
            text += chunk.text
        texts.append(text)

    tasks = [asyncio.create_task(one(number)) for number in range(32)]
    await asyncio.sleep(1)
    assert victim.usage.in_flight > 8, victim.usage.in_flight
    began_s = time.monotonic()
    match kind:
        case "agent killed":
            for process in machines.agents("a"):
                process.kill()
        case "node killed":
            machines.send("a", signal.SIGKILL)
        case "node frozen":
            machines.send("a", signal.SIGSTOP)
    await asyncio.gather(*tasks)
    right = words(ask(TOKENS, ""))
    assert texts == [right] * 32, f"{sum(text != right for text in texts)} of 32 replies are wrong"
    if kind == "node killed":
        machines.forget("a")
        machines.add("a")
    machines.send("a", signal.SIGCONT)
    return min(resumed) - began_s


def _serving(running: RunningTeam, node: str) -> list[str]:
    names = [name for name in running.engines if name.startswith("solver@") and device_of(name) == f"{node}:0"]
    return [name for name in names if running.engines[name].is_ready]


async def _until(condition: Callable[[], bool], seconds: float = 120) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  the condition is about state, which has no event
            await asyncio.sleep(0.05)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["calls", "losses"])
    parser.add_argument("--times", type=int, default=20, help="how often each loss is repeated")
    arguments = parser.parse_args()
    logs.log_to(Path(tempfile.mkdtemp(prefix="measure-cluster-")))
    await (calls() if arguments.what == "calls" else losses(arguments.times))


if __name__ == "__main__":
    asyncio.run(main())
