"""Measure a cluster of Ray nodes on this machine, over modelled engines. The figures are in runtime/cluster/README.md.

    python scripts/measure_cluster.py calls              what a call through an agent costs, beside one in this process
    python scripts/measure_cluster.py front              what a token costs the process that accepts requests
    python scripts/measure_cluster.py losses [--times N] how soon replies resume after an agent or a node is lost
    python scripts/measure_cluster.py heads [--times N]  how soon a new head serves after kill -9 of the old one

`losses` also checks that every reply is whole. `front` and `heads` run real engines, and `heads` checks that every job
is done once.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from agents.role import Message
from runtime import logs
from runtime.assembly import RunningTeam, start_team
from runtime.cluster.agent import Agent, MakeAgent
from runtime.config import Config
from runtime.engines.replicas import device_of
from runtime.engines.request import Chunk, GenerateRequest
from runtime.jobs.team import assemble
from runtime.simulation.assembly import start_modelled_team
from runtime.simulation.modelled_agent import modelled_agent
from scripts.measure import spread
from scripts.ray_machines import NODE, Machines, on_cluster

STREAMS = 64
STEP_S = 0.02
TOKENS = 150
PROBLEM = "(12+7)*3-(45-5)"


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


async def front(repeats: int) -> None:
    """Compare the processor time of a token in the front process, with engines of its own and behind an agent."""
    behind = on_cluster("local")
    device = behind.device.model_copy(update={"memory_bytes": 2 << 30})
    own = behind.model_copy(update={"cluster": None, "device": device})
    microseconds: dict[str, list[float]] = {}
    for name, config in (("own engines", own), ("behind an agent", behind.model_copy(update={"device": device}))):
        async with team_on(config, Agent) as running:
            await _generated(running)
            for _ in range(repeats):
                began_s = time.process_time()
                tokens = await _generated(running)
                microseconds.setdefault(name, []).append((time.process_time() - began_s) * 1e6 / tokens)
                print(f"{name}: {microseconds[name][-1]:.1f} us a token, {tokens} tokens", file=sys.stderr)
    print(json.dumps({f"{name}, us a token": spread(taken) for name, taken in microseconds.items()}, indent=2))


async def _generated(running: RunningTeam) -> int:
    """Stream 640 replies of 100 tokens, 32 at a time, each token in a chunk. Return the number of tokens."""

    async def one(number: int) -> int:
        request = GenerateRequest(
            str(number), (Message("user", "12+7"),), 0.0, 1.0, 100, sampling_params={"ignore_eos": True}
        )
        return len([chunk async for chunk in running.generate("solver", request)])

    return sum([sum(await asyncio.gather(*(one(number) for number in range(32)))) for _ in range(20)])


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
    """Lose a node under 32 replies. Return the seconds until the first of its replies resumes elsewhere."""
    await _until(lambda: all(len(_serving(running, node)) == 1 for node in "ab"))
    victim = running.engines["solver@a:0"]
    its_requests: set[str] = set()
    resumed: list[float] = []
    texts: list[str] = []

    async def one(number: int) -> None:
        text, request = "", ask(TOKENS, f"{name} {number}")
        async for chunk in running.generate("solver", request):
            if request.request_id in its_requests and victim.stats().state == "lost":
                its_requests.remove(request.request_id)
                resumed.append(time.monotonic())
            text += chunk.text
        texts.append(text)

    generate = victim.generate

    def note(request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        its_requests.add(request.request_id)
        return generate(request)

    victim.generate = note  # type: ignore[method-assign]

    tasks = [asyncio.create_task(one(number)) for number in range(32)]
    await asyncio.sleep(1)
    assert victim.usage.in_flight > 8, victim.usage.in_flight
    del victim.generate
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


async def heads(times: int) -> None:
    """Kill the service while it works on jobs, and start it again. Its agent keeps the engines."""
    seconds: dict[str, list[float]] = {"listening": [], "first resumed job done": [], "ready": []}
    accepted: set[str] = set()
    with Machines("a") as machines, tempfile.TemporaryDirectory() as folder:
        config = {"extends": "embedded", "cluster": {"address": machines.address, "nodes_with": NODE}}
        await asyncio.to_thread(Path(folder, "team.yaml").write_text, json.dumps(config))
        service = await _Serve(folder).listen()
        await service.until_ready()
        async with httpx.AsyncClient(timeout=120) as client:
            for number in range(times):
                posts = [client.post(f"{service.url}/jobs", json={"problem": PROBLEM}) for _ in range(30)]
                new = {response.json()["id"] for response in await asyncio.gather(*posts)}
                accepted |= new
                service.process.kill()
                await service.process.wait()
                began_s = time.monotonic()
                service = await _Serve(folder).listen()
                seconds["listening"].append(time.monotonic() - began_s)
                while not any(job["state"] == "done" for job in (await _jobs(client, service)) if job["id"] in new):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
                seconds["first resumed job done"].append(time.monotonic() - began_s)
                await service.until_ready()
                seconds["ready"].append(time.monotonic() - began_s)
                latest = {name: round(taken[-1], 2) for name, taken in seconds.items()}
                print(f"kill {number + 1}: {latest}", file=sys.stderr)
            while any(job["state"] in ("queued", "running") for job in await _jobs(client, service)):  # noqa: ASYNC110
                await asyncio.sleep(0.2)
            answers = [job["result"]["answer"] for job in await _jobs(client, service)]
            ended = await _ended(client, service)
        service.process.terminate()
        await service.process.wait()
    print(json.dumps({name: spread(taken) for name, taken in seconds.items()}, indent=2, default=str))
    print(
        json.dumps(
            {
                "accepted": len(accepted),
                "right": answers.count("17"),
                "ended more than once": len(ended) - len(set(ended)),
            }
        )
    )


class _Serve:
    """`troupe serve` in a process of its own."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.url = ""

    async def listen(self) -> "_Serve":
        """Start it, and wait until it listens."""
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "runtime.cli.main", "serve", "--port", "0", "--json", "--config", "team.yaml"),
            cwd=self._folder,
            env={**os.environ, "TROUPE_HOME": self._folder, "HF_HUB_OFFLINE": "1"},
            stdout=asyncio.subprocess.PIPE,
        )
        self.url = (await self._event("listening"))["url"]
        return self

    async def until_ready(self) -> None:
        """Wait until it is ready."""
        await self._event("ready")

    async def _event(self, name: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == name:
                return event
        raise RuntimeError(f"the service ended before it was {name}")


async def _jobs(client: httpx.AsyncClient, service: _Serve) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = (await client.get(f"{service.url}/jobs", params={"limit": 1000})).json()["jobs"]
    return jobs


async def _ended(client: httpx.AsyncClient, service: _Serve) -> list[str]:
    """Return the jobs that have ended, once for each event that says so."""
    last = (await client.post(f"{service.url}/jobs", json={"problem": "1+1"})).json()["id"]
    ended = []
    async with client.stream("GET", f"{service.url}/events", params={"after": 0}) as response:
        async for line in response.aiter_lines():
            event = json.loads(line[6:]) if line.startswith("data: ") else {}
            if event.get("kind") == "done":
                if event["job"] == last:
                    break
                ended.append(event["job"])
    return ended


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["calls", "front", "losses", "heads"])
    parser.add_argument("--times", type=int, default=20, help="how often each loss is repeated")
    arguments = parser.parse_args()
    logs.log_to(Path(tempfile.mkdtemp(prefix="measure-cluster-")))
    match arguments.what:
        case "calls":
            await calls()
        case "front":
            await front(5)
        case "losses":
            await losses(arguments.times)
        case "heads":
            await heads(arguments.times)


if __name__ == "__main__":
    asyncio.run(main())
