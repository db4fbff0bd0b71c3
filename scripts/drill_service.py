"""Fault drills of the service: break something under load, and count what was lost.

    python scripts/drill_service.py kills      kill -9 of the service at random moments
    python scripts/drill_service.py engines    kill -9 of each real engine in turn
    python scripts/drill_service.py broker     kill -9 of the MQTT broker, which stays away for 30 s
    python scripts/drill_service.py malformed  10,000 wrong HTTP requests and 10,000 wrong MQTT messages
    python scripts/drill_service.py soak       ten minutes of jobs: resident memory and size of the journal

All but `engines` use modelled engines. Results are printed as JSON. scripts/README.md lists the measured figures.
"""

import argparse
import asyncio
import json
import random
import secrets
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import aiohttp
import aiomqtt
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.measure import progress
from scripts.mosquitto import Mosquitto
from scripts.service_harness import TOPICS, ended_jobs, modelled_service, run_measure, submit, troupe_server

ANSWER = "17"
"""The answer to the harness's problem."""


async def drill_kills(options: argparse.Namespace) -> dict[str, Any]:
    """Kill the service repeatedly while jobs arrive. Then compare the jobs that it accepted with those that ended."""
    rng = random.Random(options.seed)
    accepted: set[str] = set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(1, options.kills + 1):
            progress(f"kill {number} of {options.kills}, {len(accepted)} jobs accepted")
            await _kill_under_load(folder, rng.uniform(0.05, 1.5), accepted)
        async with modelled_service(folder, time_scale=1) as (_, http):
            results = [await _result(http, id) for id in accepted]
            ends = await _count_ends(http, accepted)
    return {
        "kills": options.kills,
        "accepted": len(accepted),
        "ended": dict(Counter(result["state"] for result in results)),
        "wrong answers": sum((result["result"] or {}).get("answer") != ANSWER for result in results),
        "lost": len(accepted - set(ends)),
        "ended twice": sum(count > 1 for count in ends.values()),
    }


async def _kill_under_load(folder: Path, after_s: float, accepted: set[str]) -> None:
    """Start the service, submit jobs over 8 connections, and kill it after a time."""
    async with modelled_service(folder, time_scale=1) as (service, http):
        submitters = [asyncio.create_task(_submit_until_killed(http, accepted)) for _ in range(8)]
        await asyncio.sleep(after_s)
        service.kill()
        await asyncio.wait(submitters, timeout=5)
        for submitter in submitters:
            submitter.cancel()
        await asyncio.gather(*submitters, return_exceptions=True)


async def _submit_until_killed(http: aiohttp.ClientSession, accepted: set[str]) -> None:
    """Submit jobs until a connection fails."""
    while True:
        if id := await submit(http, idempotency_key=secrets.token_hex(8)):
            accepted.add(id)
        await asyncio.sleep(0.01)


async def _result(http: aiohttp.ClientSession, id: str, wait_s: int = 120) -> dict[str, Any]:
    async with http.get(f"/jobs/{id}/result", params={"wait_s": wait_s}) as answer:
        result: dict[str, Any] = await answer.json()
        return result


async def _count_ends(http: aiohttp.ClientSession, accepted: Collection[str]) -> Counter[str]:
    """Return how often each job in the journal has ended."""
    # The journal can hold more jobs than the accepted ones: some whose acknowledgement a kill prevented.
    async with http.get("/jobs", params={"limit": 1}) as answer:
        newest = (await answer.json())["jobs"][0]["id"]
    ends: Counter[str] = Counter()
    async with aclosing(ended_jobs(http, after=0)) as ids:
        async for id in ids:
            ends[id] += 1
            if len(ends) >= len(accepted) and newest in ends:
                break
    return ends


async def drill_engines(options: argparse.Namespace) -> dict[str, Any]:
    """Kill each real engine in turn while 300 jobs run. All must be answered, and correctly."""
    problems = [(f"({number}+7)*3-(45-5)", str((number + 7) * 3 - 40)) for number in range(300)]
    async with AsyncExitStack() as owned:
        folder = Path(owned.enter_context(tempfile.TemporaryDirectory()))
        url, process = await owned.enter_async_context(troupe_server(folder, "deliberate"))
        http = await owned.enter_async_context(aiohttp.ClientSession(url))

        async def run_job(problem: str, expected: str) -> dict[str, Any]:
            id = await submit(http, problem=problem, expected=expected)
            assert id is not None, "the service refused a job"
            return await _result(http, id, wait_s=300)

        tasks = [asyncio.create_task(run_job(*problem)) for problem in problems]
        killed = 0
        for engine in _engine_processes(process.pid):
            await asyncio.sleep(2)
            if not all(task.done() for task in tasks):
                engine.kill()
                killed += 1
        results = await asyncio.gather(*tasks)
    return {
        "killed": killed,
        "accepted": len(results),
        "ended": dict(Counter(result["state"] for result in results)),
        "right": sum(result["result"]["correct"] for result in results if result["result"]),
        "begun again": sum(result["attempts"] > 1 for result in results),
    }


def _engine_processes(service_pid: int) -> list[psutil.Process]:
    children = psutil.Process(service_pid).children(recursive=True)
    return [child for child in children if "EngineCore" in "".join(child.cmdline())]


async def drill_broker(options: argparse.Namespace) -> dict[str, Any]:
    """Kill the broker for 30 s while jobs arrive by HTTP. A subscriber must get every result."""
    accepted: set[str] = set()
    results: Counter[str] = Counter()
    async with AsyncExitStack() as owned:
        folder = Path(owned.enter_context(tempfile.TemporaryDirectory()))
        broker = await owned.enter_async_context(Mosquitto(folder))
        _, http = await owned.enter_async_context(modelled_service(folder, mqtt_port=broker.port, time_scale=1))
        subscriber = asyncio.create_task(_count_results(broker.port, results), name="subscriber")
        owned.callback(subscriber.cancel)
        await asyncio.sleep(1)
        await _submit_for(http, 5, accepted)
        progress("the broker is killed")
        await broker.stop(signal.SIGKILL)
        await _submit_for(http, 30, accepted)
        progress("the broker starts again")
        await broker.start()
        await _submit_for(http, 5, accepted)
        for _ in range(600):
            if accepted <= set(results):
                break
            await asyncio.sleep(0.1)
    return {
        "accepted": len(accepted),
        "results": len(results),
        "lost": len(accepted - set(results)),
        "sent again": results.total() - len(results),
    }


async def _submit_for(http: aiohttp.ClientSession, seconds: float, accepted: set[str]) -> None:
    """Submit a job every 50 ms."""
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        id = await submit(http)
        assert id is not None, "the service refused a job"
        accepted.add(id)
        await asyncio.sleep(0.05)


async def _count_results(port: int, results: Counter[str]) -> None:
    """Count the results of each job. Reconnect whenever the connection fails; the broker keeps results meanwhile."""
    while True:
        try:
            async with aiomqtt.Client("127.0.0.1", port, identifier="results", clean_session=False) as client:
                await client.subscribe(TOPICS.result("+"), qos=1)
                async for message in client.messages:
                    results[str(message.topic).split("/")[3]] += 1
        except aiomqtt.MqttError:
            await asyncio.sleep(0.1)


async def drill_malformed(options: argparse.Namespace) -> dict[str, Any]:
    """Send wrong bodies, paths and messages. None may make a job, and each must be refused."""
    rng = random.Random(options.seed)
    statuses: Counter[str] = Counter()
    async with AsyncExitStack() as owned:
        folder = Path(owned.enter_context(tempfile.TemporaryDirectory()))
        port = (await owned.enter_async_context(Mosquitto(folder))).port
        service, http = await owned.enter_async_context(modelled_service(folder, mqtt_port=port))
        before_mib = service.resident_mib()
        for _ in range(options.requests // 100):
            await asyncio.gather(*(_send_wrong_request(http, rng, statuses) for _ in range(100)))
        rejected = await _send_wrong_messages(port, rng, options.requests)
        async with http.get("/jobs") as answer:
            jobs = len((await answer.json())["jobs"])
        after_mib = service.resident_mib()
    return {
        "requests": options.requests,
        "answers": dict(sorted(statuses.items())),
        "messages": options.requests,
        "rejected": rejected,
        "jobs": jobs,
        "resident_mib": [round(before_mib, 1), round(after_mib, 1)],
    }


async def _send_wrong_request(http: aiohttp.ClientSession, rng: random.Random, statuses: Counter[str]) -> None:
    paths = ["/jobs", "/v1/chat/completions", "/v1/completions", "/control"]
    path = rng.choice([*paths, "/jobs/%00", "/jobs/x/events", "/control/pins/x"])
    method = rng.choice(["POST", "PUT", "PATCH", "GET", "DELETE"])
    headers = {"content-type": rng.choice(["application/json", "text/plain", "x"])}
    async with http.request(method, path, data=_wrong_body(rng), headers=headers) as answer:
        await answer.read()
        statuses[str(answer.status)] += 1


async def _send_wrong_messages(port: int, rng: random.Random, count: int) -> int:
    """Submit wrong messages by MQTT, and return how many the service rejects."""
    async with aiomqtt.Client("127.0.0.1", port) as client:
        await client.subscribe(TOPICS.rejected, qos=1)
        for _ in range(count):
            await client.publish(TOPICS.submit, _wrong_body(rng), qos=1)
        rejected = 0
        async with asyncio.timeout(60):
            async for _ in client.messages:
                rejected += 1
                if rejected == count:
                    break
        return rejected


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


async def drill_soak(options: argparse.Namespace) -> dict[str, Any]:
    """Submit jobs at a steady rate, beside slow and vanishing readers of events."""
    async with AsyncExitStack() as owned:
        folder = Path(owned.enter_context(tempfile.TemporaryDirectory()))
        service, http = await owned.enter_async_context(modelled_service(folder))
        until_s = time.monotonic() + options.seconds

        async def submit_jobs() -> int:
            accepted = 0
            while time.monotonic() < until_s:
                accepted += await submit(http) is not None
                await asyncio.sleep(0.16)
            return accepted

        async def read_a_little() -> int:
            while time.monotonic() < until_s:
                async with http.get("/events", params={"after": 0}) as answer:
                    await answer.content.read(1000)
                    await asyncio.sleep(5)
            return 0

        async def sample() -> list[float]:
            resident_mib = []
            while time.monotonic() < until_s:
                resident_mib.append(service.resident_mib())
                await asyncio.sleep(5)
            return resident_mib

        clients = asyncio.gather(*(submit_jobs() for _ in range(16)), *(read_a_little() for _ in range(4)))
        accepted, resident_mib = await asyncio.gather(clients, sample())
        await asyncio.sleep(2)
        async with http.get("/metrics") as answer:
            lines = (await answer.text()).splitlines()
        journal_bytes = (folder / "jobs.db").stat().st_size
    quarter = len(resident_mib) // 4
    return {
        "seconds": options.seconds,
        "accepted": sum(accepted),
        "journal": dict(line.rsplit(" ", 1) for line in lines if line.startswith("troupe:jobs")),
        "resident_mib_by_quarters": [
            round(statistics.median(resident_mib[n * quarter : (n + 1) * quarter]), 1) for n in range(4)
        ],
        "journal_mib": round(journal_bytes / (1 << 20), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills of the service (default: 20)")
    parser.add_argument(
        "--requests", type=int, default=10_000, help="malformed requests, and messages (default: 10000)"
    )
    parser.add_argument("--seconds", type=float, default=600, help="duration of the soak, in seconds (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="seed of kills and malformed (default: 0)")
    drills = {
        "kills": drill_kills,
        "engines": drill_engines,
        "broker": drill_broker,
        "malformed": drill_malformed,
        "soak": drill_soak,
    }
    run_measure(drills, parser)


if __name__ == "__main__":
    main()
