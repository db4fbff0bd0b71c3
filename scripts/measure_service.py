"""Measures the service: what it adds to vLLM's own server, jobs a second, faults under load, and its memory over time.

python scripts/measure_service.py jobs       jobs a second over HTTP and MQTT, over engines that answer at once
python scripts/measure_service.py overhead   a role through our HTTP, and through vLLM's own server, in turns
python scripts/measure_service.py kills      kill -9 of the service at random moments, with jobs on their way
python scripts/measure_service.py broker     kill -9 of the broker, away for 30 s
python scripts/measure_service.py engines    kill -9 of each engine in turn, with jobs on their way
python scripts/measure_service.py malformed  10,000 requests and messages that are wrong
python scripts/measure_service.py soak       ten minutes of jobs: resident memory, journal
"""

import argparse
import asyncio
import json
import os
import random
import resource
import secrets
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import aiomqtt
import psutil
import uvloop

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime import config
from runtime.api.mqtt.messages import Topics
from runtime.api.serve import serving
from runtime.config import Config, Mqtt
from runtime.jobs.team import assemble
from runtime.simulation.assembly import start_modelled_team
from scripts.measure import progress, spread
from scripts.mosquitto import Mosquitto, free_port

PROBLEM = "(12+7)*3-(45-5)"
TOPICS = Topics("main")


def configured(folder: Path, workflow: str = "deliberate", mqtt: Mqtt | None = None) -> Config:
    """The embedded team, with its journal in a folder, on any free port."""
    chosen = config.load("embedded").with_workflow(workflow)
    places = {"port": 0, "journal": str(folder / "jobs.db"), "tokens": str(folder / "tokens.json")}
    service = chosen.service.model_copy(update={**places, "queue_max": 1_000_000})
    return chosen.model_copy(update={"service": service, "mqtt": mqtt})


async def serve_modelled(folder: Path, workflow: str, mqtt_port: int | None, time_scale: float) -> None:
    """A service over modelled engines, in a process of its own: says where it listens, and runs until it is ended."""
    chosen = configured(folder, workflow, Mqtt(port=mqtt_port) if mqtt_port else None)
    team = assemble(chosen)
    opening = partial(start_modelled_team, chosen, team, time_scale=time_scale)
    async with serving(chosen, team, opening, partial(print, flush=True)):
        await asyncio.Event().wait()


class Child:
    """A process of ours that says where it listens; can be killed."""

    def __init__(self, *arguments: object) -> None:
        self._arguments = [str(argument) for argument in arguments]
        self.url = ""
        self.process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> "Child":
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, *self._arguments, stdout=asyncio.subprocess.PIPE
        )
        assert self.process.stdout is not None
        self.url = (await self.process.stdout.readline()).decode().strip()
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    def resident_mib(self) -> float:
        """Its resident memory now."""
        assert self.process is not None
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize() / (1 << 20)


async def jobs(options: argparse.Namespace) -> dict[str, Any]:
    """Jobs a second from the submission to the result, and how long an acknowledgement takes, several times each."""
    found: dict[str, Any] = {}
    for workflow in ("solo", "deliberate"):
        doors: dict[str, Callable[[Path, str, int], Coroutine[Any, Any, dict[str, float]]]] = {
            "HTTP": _jobs_by_http,
            "MQTT": _jobs_by_mqtt,
            "MQTT, the broker's messages in memory alone": partial(_jobs_by_mqtt, durable=False),
        }
        for door, run in doors.items():
            repeats = []
            for _ in range(options.repeats):
                progress(f"{door}, {workflow}")
                with tempfile.TemporaryDirectory() as folder:
                    repeats.append(await run(Path(folder), workflow, options.jobs))
            found[f"{door}, {workflow}"] = {key: spread([repeat[key] for repeat in repeats]) for key in repeats[0]}
    return found


async def _jobs_by_http(folder: Path, workflow: str, count: int) -> dict[str, float]:
    """Submitted over 32 connections; ended when the stream of all events has said so of each."""
    waiting: set[str] = set()
    acknowledged: list[float] = []
    ended: set[str] = set()
    numbers = iter(range(count))
    async with Child("serve", folder, workflow, 0, 0) as child, aiohttp.ClientSession(child.url) as http:
        await ready(http)

        async def watch() -> None:
            async with http.get("/events", timeout=aiohttp.ClientTimeout(None)) as answer:
                async for line in answer.content:
                    if line.startswith(b"data: "):
                        event = json.loads(line[6:])
                        if event["kind"] == "done":
                            ended.add(event["job"])
                            if len(ended) == count:
                                return

        async def submit() -> None:
            for _ in numbers:
                asked = time.perf_counter()
                async with http.post("/jobs", json={"problem": "12+7"}) as answer:
                    job = await answer.json()
                    assert answer.status == 202, job
                acknowledged.append(time.perf_counter() - asked)
                waiting.add(job["id"])

        watching = asyncio.create_task(watch())
        await asyncio.sleep(0.2)
        started = time.perf_counter()
        await asyncio.gather(*(submit() for _ in range(32)))
        await asyncio.wait_for(watching, 300)
        seconds = time.perf_counter() - started
    assert ended == waiting
    return {"jobs_per_s": count / seconds, **_acknowledgement(acknowledged)}


async def _jobs_by_mqtt(folder: Path, workflow: str, count: int, durable: bool = True) -> dict[str, float]:
    """Submitted and followed by one client of mosquitto, at most 200 not acknowledged at a time."""
    asked: dict[str, float] = {}
    acknowledged: list[float] = []
    ended: set[str] = set()
    room = asyncio.Semaphore(200)
    async with AsyncExitStack() as owned:
        port = (await owned.enter_async_context(Mosquitto(folder, durable=durable))).port
        child = await owned.enter_async_context(Child("serve", folder, workflow, port, 0))
        http = await owned.enter_async_context(aiohttp.ClientSession(child.url))
        await ready(http)
        client = await owned.enter_async_context(
            aiomqtt.Client("127.0.0.1", port, max_inflight_messages=500, max_queued_outgoing_messages=0)
        )
        client.pending_calls_threshold = 10_000
        await client.subscribe([(TOPICS.accepted("+"), 1), (TOPICS.result("+"), 1)])
        await asyncio.sleep(1)  # the service is connected too

        async def watch() -> None:
            async for message in client.messages:
                topic = str(message.topic)
                if topic.endswith("/accepted"):
                    assert isinstance(message.payload, bytes)
                    answer = json.loads(message.payload)
                    acknowledged.append(time.perf_counter() - asked[answer["correlation_id"]])
                    room.release()
                else:
                    ended.add(topic)
                    if len(ended) == count:
                        return

        watching = asyncio.create_task(watch())
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                await room.acquire()
                asked[str(number)] = time.perf_counter()
                payload = json.dumps({"problem": "12+7", "correlation_id": str(number)})
                group.create_task(client.publish(TOPICS.submit, payload, qos=1))
        await asyncio.wait_for(watching, 300)
        seconds = time.perf_counter() - started
    return {"jobs_per_s": count / seconds, **_acknowledgement(acknowledged)}


def _acknowledgement(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "acknowledged_p50_ms": 1e3 * ordered[len(ordered) // 2],
        "acknowledged_p99_ms": 1e3 * ordered[int(len(ordered) * 0.99)],
    }


IN_PROCESS = """
import torch
from vllm.v1.executor.uniproc_executor import UniProcExecutor

class InProcess(UniProcExecutor):
    def _init_executor(self):
        torch.cpu._init_amx()
        super()._init_executor()
"""
"""vLLM's executor without a worker process, which the CPU platform would add: as our engines have it."""


async def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """The same requests to the solver through `troupe serve` and through vLLM's own server, in turns, streamed.

    Ratios of ours to vLLM's, round by round: time to the first token (median of a round), and tokens a second.
    """
    found: dict[str, Any] = {}
    async with AsyncExitStack() as owned:
        folder = Path(owned.enter_context(tempfile.TemporaryDirectory()))
        progress("starting both servers")
        ours, _ = await owned.enter_async_context(_troupe_server(folder, "solo"))
        vllms = await owned.enter_async_context(_vllm_server(folder))
        servers = {"ours": ours, "vLLM's": vllms}
        for concurrency, count in ((1, 30), (16, 320), (100, 1000)):
            rounds: list[dict[str, dict[str, float]]] = []
            for number in range(-1, options.rounds):  # the first warms up
                progress(f"{concurrency} at once, round {number + 1} of {options.rounds}")
                order = list(servers)[:: 1 if number % 2 else -1]
                figures = {name: await _completions(servers[name], concurrency, count) for name in order}
                if number >= 0:
                    rounds.append(figures)
            found[f"{concurrency} at once"] = {
                figure: spread([one["ours"][figure] / one["vLLM's"][figure] for one in rounds])
                for figure in ("ttft_s", "tokens_per_s")
            } | {f"vLLM's {figure}": spread([one["vLLM's"][figure] for one in rounds]) for figure in rounds[0]["ours"]}
    return found


@asynccontextmanager
async def _troupe_server(folder: Path, workflow: str) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """`troupe serve` with the engines that a workflow needs (`solo`: the solver's): where it listens, its process."""
    (folder / "team.yaml").write_text(f"extends: embedded\nworkflow: {{name: {workflow}}}\n")
    command = (sys.executable, "-m", "runtime.cli.main", "serve", "--json", "--port", "0", "-c", folder / "team.yaml")
    environment = {**os.environ, "TROUPE_HOME": str(folder / "home")}
    async with _running(*command, cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE) as process:
        assert process.stdout is not None
        url = ""
        async for line in process.stdout:
            event = json.loads(line)
            url = event.get("url", url)
            if event["event"] == "ready":
                break
        yield url, process


@asynccontextmanager
async def _vllm_server(folder: Path) -> AsyncIterator[str]:
    """vLLM's own server, with the same model and settings."""
    spec = config.load("embedded").engines["solver"]
    (folder / "in_process.py").write_text(IN_PROCESS)
    port = free_port()
    settings = {
        "model": spec.model,
        "served-model-name": "solver",
        "host": "127.0.0.1",
        "port": port,
        "dtype": spec.dtype,
        "max-num-seqs": spec.max_num_seqs,
        "kv-cache-memory-bytes": 256 << 20,
        "distributed-executor-backend": "in_process.InProcess",
    }
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    command = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", *arguments)
    with (folder / "vllm.log").open("wb") as log:
        async with _running(*command, cwd=folder, env=environment, stdout=log, stderr=log) as process:
            url = f"http://127.0.0.1:{port}"
            async with aiohttp.ClientSession(url) as http, asyncio.timeout(180):
                while True:
                    assert process.returncode is None, (folder / "vllm.log").read_text()[-2000:]
                    try:
                        async with http.get("/health") as answer:
                            if answer.status == 200:
                                break
                    except aiohttp.ClientError:
                        await asyncio.sleep(0.5)
            yield url


@asynccontextmanager
async def _running(*command: object, **options: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(*map(str, command), **options)
    try:
        yield process
    finally:
        process.terminate()
        await process.wait()


async def _completions(url: str, concurrency: int, count: int) -> dict[str, float]:
    """Streamed completions of 64 tokens, so many at once."""
    first: list[float] = []
    tokens = 0
    prompts = iter([[50 + number % 200, 4, 50 + number % 190] for number in range(count)])

    async def ask(http: aiohttp.ClientSession) -> None:
        nonlocal tokens
        for prompt in prompts:
            body = {"model": "solver", "prompt": prompt, "max_tokens": 64, "temperature": 0, "ignore_eos": True}
            asked, seen = time.perf_counter(), False
            async with http.post("/v1/completions", json={**body, "stream": True}) as answer:
                assert answer.status == 200, await answer.text()
                async for line in answer.content:
                    if line.startswith(b"data: {") and not seen:
                        first.append(time.perf_counter() - asked)
                        seen = True
            tokens += 64

    started = time.perf_counter()
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as http:
        await asyncio.gather(*(ask(http) for _ in range(concurrency)))
    seconds = time.perf_counter() - started
    return {"ttft_s": statistics.median(first), "tokens_per_s": tokens / seconds}


async def kills(options: argparse.Namespace) -> dict[str, Any]:
    """kill -9 of the service at random moments while jobs come in; then all that was accepted is held against what
    ended."""
    rng = random.Random(options.seed)
    accepted: dict[str, str] = {}
    refused = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for round_ in range(options.kills + 1):
            last = round_ == options.kills
            progress(f"start {round_ + 1}, {len(accepted)} accepted")
            async with Child("serve", folder, "deliberate", 0, 1) as child, aiohttp.ClientSession(child.url) as http:
                await ready(http)
                if last:
                    break

                async def submit(http: aiohttp.ClientSession = http) -> None:
                    nonlocal refused
                    while True:
                        key = secrets.token_hex(8)
                        body = {"problem": PROBLEM, "idempotency_key": key}
                        async with http.post("/jobs", json=body) as answer:
                            if answer.status == 202:
                                accepted[key] = (await answer.json())["id"]
                            else:
                                refused += 1
                        await asyncio.sleep(0.01)

                tasks = [asyncio.create_task(submit()) for _ in range(8)]
                await asyncio.sleep(rng.uniform(0.05, 1.5))
                assert child.process is not None
                child.process.send_signal(signal.SIGKILL)
                await asyncio.wait(tasks, timeout=5)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        async with Child("serve", folder, "deliberate", 0, 1) as child, aiohttp.ClientSession(child.url) as http:
            await ready(http)
            states: Counter[str] = Counter()
            wrong = 0
            for job in accepted.values():
                async with http.get(f"/jobs/{job}/result", params={"wait_s": 120}) as answer:
                    found = await answer.json()
                    states[found["state"]] += 1
                    wrong += (found["result"] or {}).get("answer") != "17"
            ends: Counter[str] = Counter()
            async with http.get("/jobs", params={"limit": 1}) as answer:
                newest = (await answer.json())["jobs"][0]["id"]
            async with http.get("/events", params={"after": 0}) as answer:
                async for line in answer.content:
                    if line.startswith(b"data: "):
                        event = json.loads(line[6:])
                        if event["kind"] == "done":
                            ends[event["job"]] += 1
                            if len(ends) >= len(accepted) and newest in ends:
                                break
    return {
        "kills": options.kills,
        "accepted": len(accepted),
        "ended": dict(states),
        "wrong answers": wrong,
        "lost": len(set(accepted.values()) - set(ends)),
        "ended twice": sum(count > 1 for count in ends.values()),
    }


async def broker(options: argparse.Namespace) -> dict[str, Any]:
    """kill -9 of the broker, away for 30 s, while jobs go on coming by HTTP: does a subscriber get every result?"""
    accepted: set[str] = set()
    ended: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with AsyncExitStack() as owned:
            served_by = await owned.enter_async_context(Mosquitto(folder))
            child = await owned.enter_async_context(Child("serve", folder, "deliberate", served_by.port, 1))
            http = await owned.enter_async_context(aiohttp.ClientSession(child.url))
            await ready(http)

            async def subscribe() -> None:
                """Comes back whenever the broker does; what came meanwhile waits for it there."""
                while True:
                    try:
                        here = aiomqtt.Client("127.0.0.1", served_by.port, identifier="results", clean_session=False)
                        async with here as client:
                            await client.subscribe(TOPICS.result("+"), qos=1)
                            async for message in client.messages:
                                ended[str(message.topic).split("/")[3]] += 1
                    except aiomqtt.MqttError:
                        await asyncio.sleep(0.1)

            subscriber = asyncio.create_task(subscribe())
            await asyncio.sleep(1)
            began, away = time.monotonic(), False
            while (seconds := time.monotonic() - began) < 40:
                if seconds > 5 and not away:
                    progress("the broker is killed")
                    await served_by.stop(signal.SIGKILL)
                    away = True
                async with http.post("/jobs", json={"problem": PROBLEM}) as answer:
                    accepted.add((await answer.json())["id"])
                await asyncio.sleep(0.05)
                if away and seconds > 35 and served_by.is_down:
                    progress("the broker is back")
                    await served_by.start()
            for _ in range(600):
                if accepted <= set(ended):
                    break
                await asyncio.sleep(0.1)
            subscriber.cancel()
    return {
        "accepted": len(accepted),
        "results": len(ended),
        "lost": len(accepted - set(ended)),
        "sent again": ended.total() - len(ended),
    }


async def engines(options: argparse.Namespace) -> dict[str, Any]:
    """kill -9 of each real engine in turn, with jobs on their way: are all answered, and rightly?"""
    asked = [(f"({number}+7)*3-(45-5)", str((number + 7) * 3 - 40)) for number in range(300)]
    async with AsyncExitStack() as owned:
        folder = Path(owned.enter_context(tempfile.TemporaryDirectory()))
        url, process = await owned.enter_async_context(_troupe_server(folder, "deliberate"))
        http = await owned.enter_async_context(aiohttp.ClientSession(url))

        async def job(problem: str, expected: str) -> dict[str, Any]:
            async with http.post("/jobs", json={"problem": problem, "expected": expected}) as answer:
                id = (await answer.json())["id"]
            async with http.get(f"/jobs/{id}/result", params={"wait_s": 300}) as answer:
                found: dict[str, Any] = await answer.json()
                return found

        jobs = [asyncio.create_task(job(*one)) for one in asked]
        killed = 0
        for place in range(3):
            await asyncio.sleep(2)
            children = psutil.Process(process.pid).children(recursive=True)
            living = [child for child in children if "EngineCore" in "".join(child.cmdline())]
            if not all(task.done() for task in jobs):
                living[min(place, len(living) - 1)].kill()
                killed += 1
        done = await asyncio.gather(*jobs)
    return {
        "killed": killed,
        "accepted": len(done),
        "ended": dict(Counter(job["state"] for job in done)),
        "right": sum(job["result"]["correct"] for job in done if job["result"]),
        "begun again": sum(job["attempts"] > 1 for job in done),
    }


async def malformed(options: argparse.Namespace) -> dict[str, Any]:
    """Bodies, paths and messages that are wrong in many ways: what is answered, and what is left."""
    rng = random.Random(options.seed)
    statuses: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with AsyncExitStack() as owned:
            port = (await owned.enter_async_context(Mosquitto(folder))).port
            child = await owned.enter_async_context(Child("serve", folder, "deliberate", port, 0))
            http = await owned.enter_async_context(aiohttp.ClientSession(child.url))
            await ready(http)
            before = child.resident_mib()
            for _ in range(options.requests // 100):
                await asyncio.gather(*(_wrong_request(http, rng, statuses) for _ in range(100)))
            client = await owned.enter_async_context(aiomqtt.Client("127.0.0.1", port))
            await client.subscribe(TOPICS.rejected, qos=1)
            for _ in range(options.requests):
                await client.publish(TOPICS.submit, _wrong_body(rng), qos=1)
            rejected = 0
            async with asyncio.timeout(60):
                async for _ in client.messages:
                    rejected += 1
                    if rejected == options.requests:
                        break
            async with http.get("/jobs") as answer:
                left = len((await answer.json())["jobs"])
            after = child.resident_mib()
    return {
        "requests": options.requests,
        "answers": dict(sorted(statuses.items())),
        "messages": options.requests,
        "rejected": rejected,
        "jobs": left,
        "resident_mib": [round(before, 1), round(after, 1)],
    }


def _wrong_body(rng: random.Random) -> bytes:
    kinds: list[Callable[[], bytes]] = [
        lambda: rng.randbytes(rng.randrange(200)),
        lambda: json.dumps({"problem": rng.choice([None, 3, [], {}, "", True])}).encode(),
        lambda: b"[" * rng.randrange(1, 5000),
        lambda: json.dumps({"problem": "1+1", "correlation_id": "x", f"key{rng.random()}": 1}).encode(),
        lambda: json.dumps({"problem": "1+1", "correlation_id": "x", "priority": rng.choice([-1, 1e99, "a"])}).encode(),
        lambda: b'{"problem": "\\ud800", "correlation_id": "x"}',
    ]
    return rng.choice(kinds)()


async def _wrong_request(http: aiohttp.ClientSession, rng: random.Random, statuses: Counter[str]) -> None:
    path = rng.choice(
        [
            "/jobs",
            "/v1/chat/completions",
            "/v1/completions",
            "/control",
            "/jobs/%00",
            "/jobs/x/events",
            "/control/pins/x",
        ]
    )
    method = rng.choice(["POST", "PUT", "PATCH", "GET", "DELETE"])
    headers = {"content-type": rng.choice(["application/json", "text/plain", "x"])}
    async with http.request(method, path, data=_wrong_body(rng), headers=headers) as answer:
        await answer.read()
        statuses[str(answer.status)] += 1


async def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Jobs at a steady rate, with slow and vanishing readers of events beside them."""
    samples: list[tuple[float, float]] = []
    done = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with Child("serve", folder, "deliberate", 0, 0) as child, aiohttp.ClientSession(child.url) as http:
            await ready(http)
            ends = time.monotonic() + options.seconds

            async def submit() -> None:
                nonlocal done
                while time.monotonic() < ends:
                    async with http.post("/jobs", json={"problem": PROBLEM}) as answer:
                        done += answer.status == 202
                    await asyncio.sleep(0.16)

            async def slow_reader() -> None:
                """Reads a little and goes away."""
                while time.monotonic() < ends:
                    async with http.get("/events", params={"after": 0}) as answer:
                        await answer.content.read(1000)
                        await asyncio.sleep(5)

            async def sample() -> None:
                while time.monotonic() < ends:
                    samples.append((time.monotonic(), child.resident_mib()))
                    await asyncio.sleep(5)

            await asyncio.gather(*(submit() for _ in range(16)), *(slow_reader() for _ in range(4)), sample())
            await asyncio.sleep(2)
            async with http.get("/metrics") as answer:
                figures = dict(
                    line.rsplit(" ", 1) for line in (await answer.text()).splitlines() if line.startswith("troupe:jobs")
                )
        size = (folder / "jobs.db").stat().st_size / (1 << 20)
    quarter = len(samples) // 4
    return {
        "seconds": options.seconds,
        "accepted": done,
        "journal": figures,
        "resident_mib_by_quarters": [
            round(statistics.median(mib for _, mib in samples[n * quarter : (n + 1) * quarter]), 1) for n in range(4)
        ],
        "journal_mib": round(size, 1),
    }


async def ready(http: aiohttp.ClientSession) -> None:
    """Wait until a service is."""
    for _ in range(600):
        async with http.get("/ready") as answer:
            if answer.status == 200:
                return
        await asyncio.sleep(0.1)
    raise TimeoutError("the service is not ready")


def main() -> None:
    """Run one measurement and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    measures: dict[str, Callable[[argparse.Namespace], Coroutine[Any, Any, Any]]] = {
        "jobs": jobs,
        "overhead": overhead,
        "kills": kills,
        "broker": broker,
        "engines": engines,
        "malformed": malformed,
        "soak": soak,
    }
    for name, measure in measures.items():
        command = commands.add_parser(name, help=measure.__doc__)
        command.add_argument("--repeats", type=int, default=3)
        command.add_argument("--rounds", type=int, default=10)
        command.add_argument("--jobs", type=int, default=5000)
        command.add_argument("--kills", type=int, default=20)
        command.add_argument("--requests", type=int, default=10_000)
        command.add_argument("--seconds", type=float, default=600)
        command.add_argument("--seed", type=int, default=0)
    child = commands.add_parser("serve")
    child.add_argument("folder", type=Path)
    child.add_argument("workflow")
    child.add_argument("mqtt_port", type=int)
    child.add_argument("time_scale", type=float)
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if options.what == "serve":
            runner.run(serve_modelled(options.folder, options.workflow, options.mqtt_port, options.time_scale))
        else:
            print(json.dumps(runner.run(measures[options.what](options)), indent=1))


if __name__ == "__main__":
    main()
