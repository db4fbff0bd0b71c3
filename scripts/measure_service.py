"""Measure the rate of the service, and its overhead over vLLM's own server.

    python scripts/measure_service.py jobs       jobs a second by HTTP and MQTT, over engines that reply at once
    python scripts/measure_service.py overhead   one role through `troupe serve` and through vLLM's own server

Results are medians and ranges over repeats, as JSON. scripts/README.md lists the measured figures.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import aiomqtt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime import config
from scripts.measure import progress, spread
from scripts.mosquitto import Mosquitto, free_port
from scripts.service_harness import TOPICS, ended_jobs, modelled_service, run_measure, running, submit, troupe_server

CONNECTIONS = 32
UNACKNOWLEDGED_MAX = 200
"""Maximum number of MQTT submissions that wait for their acknowledgement."""
ENDED_WITHIN_S = 300
COMPLETION_TOKENS = 64
COMPLETION_LOADS = ((1, 30), (16, 320), (100, 1000))
"""Concurrent completions, and completions in one round."""


async def measure_jobs(options: argparse.Namespace) -> dict[str, Any]:
    """Jobs a second from submission to result, and the time until a submission is acknowledged."""
    doors: dict[str, Callable[[Path, str, int], Coroutine[Any, Any, dict[str, float]]]] = {
        "HTTP": _jobs_by_http,
        "MQTT": _jobs_by_mqtt,
        "MQTT, the broker's messages in memory alone": partial(_jobs_by_mqtt, durable=False),
    }
    figures: dict[str, Any] = {}
    for workflow in ("solo", "deliberate"):
        for door, run in doors.items():
            repeats = []
            for _ in range(options.repeats):
                progress(f"{door}, {workflow}")
                with tempfile.TemporaryDirectory() as folder:
                    repeats.append(await run(Path(folder), workflow, options.jobs))
            figures[f"{door}, {workflow}"] = {key: spread([repeat[key] for repeat in repeats]) for key in repeats[0]}
    return figures


async def _jobs_by_http(folder: Path, workflow: str, count: int) -> dict[str, float]:
    """Submit jobs over 32 connections, until the stream of events has reported the end of each."""
    accepted: set[str] = set()
    ended: set[str] = set()
    acknowledged_s: list[float] = []
    numbers = iter(range(count))
    async with modelled_service(folder, workflow) as (_, http):

        async def watch() -> None:
            async with aclosing(ended_jobs(http)) as ids:
                async for id in ids:
                    ended.add(id)
                    if len(ended) == count:
                        return

        async def submit_jobs() -> None:
            for _ in numbers:
                asked_s = time.perf_counter()
                id = await submit(http, problem="12+7")
                assert id is not None, "the service refused a job"
                acknowledged_s.append(time.perf_counter() - asked_s)
                accepted.add(id)

        watching = asyncio.create_task(watch(), name="events")
        await asyncio.sleep(0.2)
        started_s = time.perf_counter()
        await asyncio.gather(*(submit_jobs() for _ in range(CONNECTIONS)))
        await asyncio.wait_for(watching, ENDED_WITHIN_S)
        seconds = time.perf_counter() - started_s
    assert ended == accepted
    return {"jobs_per_s": count / seconds, **_percentiles(acknowledged_s)}


async def _jobs_by_mqtt(folder: Path, workflow: str, count: int, durable: bool = True) -> dict[str, float]:
    """Submit and follow jobs with one MQTT client."""
    asked_s: dict[str, float] = {}
    acknowledged_s: list[float] = []
    ended: set[str] = set()
    unacknowledged = asyncio.Semaphore(UNACKNOWLEDGED_MAX)
    async with AsyncExitStack() as owned:
        port = (await owned.enter_async_context(Mosquitto(folder, durable=durable))).port
        await owned.enter_async_context(modelled_service(folder, workflow, mqtt_port=port))
        client = await owned.enter_async_context(
            aiomqtt.Client("127.0.0.1", port, max_inflight_messages=500, max_queued_outgoing_messages=0)
        )
        client.pending_calls_threshold = 10_000
        await client.subscribe([(TOPICS.accepted("+"), 1), (TOPICS.result("+"), 1)])
        await asyncio.sleep(1)  # until the service has connected to the broker

        async def watch() -> None:
            async for message in client.messages:
                topic = str(message.topic)
                if topic.endswith("/accepted"):
                    assert isinstance(message.payload, bytes)
                    answer = json.loads(message.payload)
                    acknowledged_s.append(time.perf_counter() - asked_s[answer["correlation_id"]])
                    unacknowledged.release()
                else:
                    ended.add(topic)
                    if len(ended) == count:
                        return

        watching = asyncio.create_task(watch(), name="messages")
        started_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                await unacknowledged.acquire()
                asked_s[str(number)] = time.perf_counter()
                payload = json.dumps({"problem": "12+7", "correlation_id": str(number)})
                group.create_task(client.publish(TOPICS.submit, payload, qos=1))
        await asyncio.wait_for(watching, ENDED_WITHIN_S)
        seconds = time.perf_counter() - started_s
    return {"jobs_per_s": count / seconds, **_percentiles(acknowledged_s)}


def _percentiles(acknowledged_s: list[float]) -> dict[str, float]:
    ordered = sorted(acknowledged_s)
    return {
        "acknowledged_p50_ms": 1e3 * ordered[len(ordered) // 2],
        "acknowledged_p99_ms": 1e3 * ordered[int(len(ordered) * 0.99)],
    }


async def measure_overhead(options: argparse.Namespace) -> dict[str, Any]:
    """The same streamed requests to the solver through `troupe serve` and through vLLM's own server.

    The servers take turns. Ratios are ours to vLLM's in each round: median time to the first token, tokens a second.
    """
    figures: dict[str, Any] = {}
    async with AsyncExitStack() as owned:
        folder = Path(owned.enter_context(tempfile.TemporaryDirectory()))
        progress("starting both servers")
        ours, _ = await owned.enter_async_context(troupe_server(folder, "solo"))
        vllms = await owned.enter_async_context(_vllm_server(folder))
        for concurrency, count in COMPLETION_LOADS:
            rounds = await _rounds({"ours": ours, "vLLM's": vllms}, concurrency, count, options.rounds)
            ratios = {
                name: spread([by_server["ours"][name] / by_server["vLLM's"][name] for by_server in rounds])
                for name in ("ttft_s", "tokens_per_s")
            }
            vllm = {f"vLLM's {name}": spread([by_server["vLLM's"][name] for by_server in rounds]) for name in ratios}
            figures[f"{concurrency} at once"] = ratios | vllm
    return figures


async def _rounds(urls: dict[str, str], concurrency: int, count: int, rounds: int) -> list[dict[str, dict[str, float]]]:
    """Measure the servers alternately, after a warm-up round. Return the figures of each server in each round."""
    measured = []
    for number in range(-1, rounds):
        progress(f"{concurrency} at once, round {number + 1} of {rounds}")
        order = list(urls)[:: 1 if number % 2 else -1]
        by_server = {name: await _complete(urls[name], concurrency, count) for name in order}
        if number >= 0:
            measured.append(by_server)
    return measured


IN_PROCESS = """
import torch
from vllm.v1.executor.uniproc_executor import UniProcExecutor

class InProcess(UniProcExecutor):
    def _init_executor(self):
        torch.cpu._init_amx()
        super()._init_executor()
"""
"""vLLM's executor without the worker process that the CPU platform adds. Our engines have none either."""


@asynccontextmanager
async def _vllm_server(folder: Path) -> AsyncIterator[str]:
    """Start vLLM's own server with the same model and settings. Yield its address once it is healthy."""
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
    url = f"http://127.0.0.1:{port}"
    with (folder / "vllm.log").open("wb") as log:
        async with running(*command, cwd=folder, env=environment, stdout=log, stderr=log) as process:
            async with aiohttp.ClientSession(url) as http, asyncio.timeout(180):
                while not await _is_healthy(http):
                    assert process.returncode is None, (folder / "vllm.log").read_text()[-2000:]
                    await asyncio.sleep(0.5)
            yield url


async def _is_healthy(http: aiohttp.ClientSession) -> bool:
    try:
        async with http.get("/health") as answer:
            return answer.status == 200
    except aiohttp.ClientError:
        return False


async def _complete(url: str, concurrency: int, count: int) -> dict[str, float]:
    """Stream completions of 64 tokens, `concurrency` at once."""
    first_token_s: list[float] = []
    prompts = iter([[50 + number % 200, 4, 50 + number % 190] for number in range(count)])

    async def ask(http: aiohttp.ClientSession) -> None:
        first_token_s.extend([await _time_to_first_token_s(http, prompt) for prompt in prompts])

    started_s = time.perf_counter()
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as http:
        await asyncio.gather(*(ask(http) for _ in range(concurrency)))
    seconds = time.perf_counter() - started_s
    return {"ttft_s": statistics.median(first_token_s), "tokens_per_s": count * COMPLETION_TOKENS / seconds}


async def _time_to_first_token_s(http: aiohttp.ClientSession, prompt: list[int]) -> float:
    """Read a whole streamed completion, and return the seconds until its first token."""
    body = {
        "model": "solver",
        "prompt": prompt,
        "max_tokens": COMPLETION_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    asked_s = time.perf_counter()
    first_token_s = None
    async with http.post("/v1/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if first_token_s is None and line.startswith(b"data: {"):
                first_token_s = time.perf_counter() - asked_s
    assert first_token_s is not None, "the server sent no token"
    return first_token_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="services to start for each figure of jobs (default: 3)")
    parser.add_argument("--jobs", type=int, default=5000, help="jobs in each repeat (default: 5000)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of overhead (default: 10)")
    run_measure({"jobs": measure_jobs, "overhead": measure_overhead}, parser)


if __name__ == "__main__":
    main()
