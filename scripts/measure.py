"""Measure start-up, orchestration and the accuracy of the team.

    python scripts/measure.py start          time from the command to the first answer and to all sample answers
    python scripts/measure.py overhead       problems through the team, and the same requests straight to vLLM
    python scripts/measure.py streaming      problems with every token streamed, and with messages of 64 tokens
    python scripts/measure.py orchestrator   role calls a second over fake engines, and resident memory
    python scripts/measure.py traces         processor time of a role call over fake engines, with and without traces
    python scripts/measure.py team           accuracy of the solver alone, of the team without critic, and of the team
    python scripts/measure.py problems       write configs/problems/held-out.jsonl again

Results are medians and ranges over repeats. Alternatives run in turn in one process. scripts/README.md lists the
measured figures.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from agents.arithmetic import oracle, sampling
from agents.workflow import RoleCall, Workflow
from runtime import config, logs, run_folder
from runtime.config import Traces
from runtime.engines import replicas
from runtime.engines.fake import FakeEngine
from runtime.engines.fleet import Fleet
from runtime.engines.handle import EngineHandle
from runtime.engines.request import GenerateRequest
from runtime.engines.supervised import SupervisedEngine
from runtime.jobs import problems
from runtime.jobs.batch import summarise, work_all
from runtime.jobs.job import Job, JobResult
from runtime.jobs.orchestrator import STREAM_INTERVAL, Orchestrator
from runtime.jobs.reply_record import ReplyRecord
from runtime.jobs.run import Run
from runtime.jobs.team import Team, assemble
from runtime.jobs.tool_record import ToolRecord
from runtime.tracing.traced import traced

SAMPLE = ROOT / "configs" / "problems" / "sample.jsonl"
HELD_OUT = ROOT / "configs" / "problems" / "held-out.jsonl"


def measure_start(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the seconds from the start of `troupe solve --file` to its first and its last answer."""
    command = [sys.executable, "-m", "runtime.cli.main", "solve", "--file", str(SAMPLE), "--json"]
    expected = len(SAMPLE.read_text().splitlines())
    first, last = [], []
    for repeat in range(options.repeats + 1):
        started = time.monotonic()
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            times = [time.monotonic() - started for line in process.stdout if '"elapsed_s"' in line]
        if process.returncode or len(times) != expected:
            raise SystemExit(f"{' '.join(command)} ended with code {process.returncode} after {len(times)} answers")
        if repeat:  # the first run warms the page cache
            first.append(times[0])
            last.append(times[-1])
        progress(f"start {repeat}/{options.repeats}: first answer {times[0]:.1f} s, all {times[-1]:.1f} s")
    return {"first_answer_s": spread(first), "all_answers_s": spread(last), "problems": expected}


@dataclass
class Asked:
    """A request of a job, and the requests that its reply led to."""

    request: GenerateRequest
    engine: str
    then: list["Asked"] = field(default_factory=list)


class Recorder(Orchestrator):
    """An orchestrator that records which request led to which."""

    def __init__(self, team: Team, engines: dict[str, EngineHandle]) -> None:
        super().__init__(team, engines)
        self.recorded: dict[str, list[Asked]] = {}
        self._asked: dict[tuple[str, int], Asked] = {}
        self._cause: dict[tuple[str, int], Asked] = {}

    def _take(self, run: Run, workflow: Workflow, call: RoleCall, recorded: ReplyRecord) -> list[RoleCall]:
        due, job = super()._take(run, workflow, call, recorded), run.job.id
        for next_call in due:
            self._cause[job, next_call.number] = self._asked[job, call.number]
        return due

    async def _ask(self, run: Run, call: RoleCall, tools: Mapping[int, Sequence[ToolRecord]]) -> ReplyRecord:
        seat, job = self.team.seats[call.seat], run.job.id
        asked = self._asked[job, call.number] = Asked(self.caller.request(run, seat, call), seat.engine)
        cause = self._cause.get((job, call.number))
        (cause.then if cause else self.recorded.setdefault(job, [])).append(asked)
        return await super()._ask(run, call, tools)


async def measure_overhead(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the seconds for problems through the team, and for the same requests in the same order straight to vLLM.

    The straight side renders chats and streams tokens as vLLM's own server does, without roles, workflow, parsing and
    accounting. Both sides keep the same number of jobs open.
    """
    team = assemble(config.load("embedded"))
    jobs = [job(p) for p in problems.read(HELD_OUT)[: options.problems]]
    async with fleet() as engines:
        recorder = Recorder(team, engines)
        await work_all(recorder, jobs, options.concurrency, lambda result: None)
        trees = [recorder.recorded[job.id] for job in jobs]
        count = sum(size(tree) for tree in trees)
        through: list[float] = []
        straight: list[float] = []
        for repeat in range(options.repeats + 1):
            sides: list[tuple[list[float], Callable[[], Coroutine[Any, Any, None]]]] = [
                (
                    through,
                    lambda: work_all(
                        Orchestrator(team, replicas.gathered(engines)), jobs, options.concurrency, lambda result: None
                    ),
                ),
                (straight, lambda: send_straight(engines, trees, options.concurrency)),
            ]
            for times, side in sides if repeat % 2 else reversed(sides):
                started = time.monotonic()
                await side()
                if repeat:  # the first of each warms up
                    times.append(time.monotonic() - started)
            progress(f"overhead {repeat}/{options.repeats}")
    return {
        "problems": len(jobs),
        "requests": count,
        "concurrency": options.concurrency,
        "team_s": spread(through),
        "straight_s": spread(straight),
        "ratio": spread([a / b for a, b in zip(through, straight, strict=True)]),
    }


async def measure_streaming(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the seconds for problems with every token streamed, as in a benchmark, and with messages of 64 tokens."""
    team = assemble(config.load("embedded"))
    jobs = [job(p) for p in problems.read(HELD_OUT)[: options.problems]]
    seconds: dict[int, list[float]] = {1: [], STREAM_INTERVAL: []}
    async with fleet() as engines:
        for repeat in range(options.repeats + 1):
            for interval in seconds if repeat % 2 else reversed(seconds):
                started = time.monotonic()
                orchestrator = Orchestrator(team, replicas.gathered(engines), stream_interval=interval)
                await work_all(orchestrator, jobs, options.concurrency, lambda result: None)
                if repeat:  # the first of each warms up
                    seconds[interval].append(time.monotonic() - started)
            progress(f"streaming {repeat}/{options.repeats}")
    return {
        "problems": len(jobs),
        "concurrency": options.concurrency,
        "every_token_s": spread(seconds[1]),
        f"{STREAM_INTERVAL}_together_s": spread(seconds[STREAM_INTERVAL]),
        "ratio": spread([a / b for a, b in zip(*seconds.values(), strict=True)]),
    }


async def send_straight(engines: dict[str, EngineHandle], trees: list[list[Asked]], concurrency: int) -> None:
    """Send the recorded requests to AsyncLLM, each as soon as the request that led to it is answered."""
    from runtime.engines import vllm_engine  # heavy imports, which the fleet has already made
    from runtime.engines.sampling import to_params

    numbers = iter(range(10**9))

    async def send(asked: Asked) -> None:
        supervised = engines[asked.engine]
        assert isinstance(supervised, SupervisedEngine)
        assert isinstance(supervised._engine, vllm_engine.VllmEngine)
        llm = supervised._engine._ready()  # bypass the seam, whose overhead is measured
        chat = [{"role": m.role, "content": m.content} for m in asked.request.messages]
        _, (prompt,) = await llm.renderer.render_chat_async([chat], vllm_engine._CHAT)
        params = to_params(asked.request, llm.model_config.max_model_len)
        async for _ in llm.generate(prompt, params, f"straight-{next(numbers)}"):
            pass
        await send_all(asked.then)

    async def send_all(requests: list[Asked]) -> None:
        if len(requests) == 1:
            await send(requests[0])
        elif requests:
            await asyncio.gather(*map(send, requests))

    waiting = iter(trees)

    async def worker() -> None:
        for tree in waiting:
            await send_all(tree)

    await asyncio.gather(*(worker() for _ in range(concurrency)))


def size(tree: list[Asked]) -> int:
    return sum(1 + size(asked.then) for asked in tree)


async def measure_orchestrator(options: argparse.Namespace) -> dict[str, Any]:
    """Measure role calls a second over fake engines that reply at once, and resident memory."""
    engines = await fake_engines()
    orchestrator = Orchestrator(assemble(config.load("embedded")), replicas.gathered(engines))
    jobs = drawn_jobs(1000)
    rates, memory, calls = [], [], 0
    while calls < options.calls:
        started, before = time.monotonic(), calls
        await work_all(orchestrator, jobs, options.concurrency, lambda result: None)
        calls = served(engines)
        rates.append((calls - before) / (time.monotonic() - started))
        memory.append(psutil.Process().memory_info().rss / 2**20)
        progress(f"orchestrator {calls}/{options.calls} calls, {rates[-1]:.0f}/s, {memory[-1]:.1f} MiB")
    return {
        "calls": calls,
        "calls_per_s": spread(rates),
        "resident_mib_after_first_1000_jobs": round(memory[0], 1),
        "resident_mib_at_the_end": round(memory[-1], 1),
    }


async def measure_traces(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the processor time of a role call over fake engines that reply at once, export included.

    The traces are off, or go to a receiver in another process, or to a port at which nobody listens.
    """
    os.environ.setdefault("OTEL_BSP_MAX_QUEUE_SIZE", "100000")  # fake engines are fast enough to fill the default
    folder = run_folder.create()
    logs.log_to(folder)
    embedded = config.load("embedded")
    team, engines, jobs = assemble(embedded), await fake_engines(), drawn_jobs(300)
    microseconds: dict[str, list[float]] = {"off": [], "received": [], "nobody_listens": []}
    with receiver() as url:
        sides = {
            "off": None,
            "received": Traces(endpoint=url, protocol="http/protobuf"),
            "nobody_listens": Traces(endpoint="http://127.0.0.1:9", protocol="http/protobuf"),
        }
        for repeat in range(options.repeats + 1):
            for side, traces in sides.items() if repeat % 2 else reversed(sides.items()):
                started_s, before = time.process_time(), served(engines)
                async with traced(embedded.model_copy(update={"traces": traces})) as tracing:
                    orchestrator = Orchestrator(team, engines, tracing.on_event)
                    await work_all(orchestrator, jobs, options.concurrency, lambda result: None)
                calls = served(engines) - before
                if repeat:  # the first of each warms up
                    microseconds[side].append((time.process_time() - started_s) / calls * 1e6)
            progress(f"traces {repeat}/{options.repeats}")
    return {"calls": calls, **{f"{side}_us_per_call": spread(values) for side, values in microseconds.items()}}


@contextmanager
def receiver() -> Iterator[str]:
    """Run a process that takes every HTTP request; yield its URL."""
    code = """
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        pass

server = HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.kill()


async def fake_engines() -> dict[str, EngineHandle]:
    """Start engines that reply at once, and always correctly."""
    engines: dict[str, EngineHandle] = {
        name: FakeEngine(name, lambda request: oracle.reply(request.messages[-1].content))
        for name in ("planner", "solver", "critic")
    }
    for engine in engines.values():
        await engine.start()
    return engines


def drawn_jobs(count: int) -> list[Job]:
    rng = random.Random(0)
    return [Job(str(n), sampling.draw_expression(rng).text) for n in range(count)]


def served(engines: Mapping[str, EngineHandle]) -> int:
    return sum(engine.stats().requests for engine in engines.values())


async def measure_team(options: argparse.Namespace) -> dict[str, Any]:
    """Count the held-out problems that each team answers correctly, greedy and at temperature 1."""
    shipped = config.load("embedded")
    teams = {
        "solver alone, at once": assemble(shipped.with_workflow("solo")),
        "team without critic": assemble(config.load("embedded-unchecked")),
        "whole team": assemble(shipped),
        "whole team, vote of 3": assemble(shipped.with_workflow("vote")),
    }
    asked = problems.read(HELD_OUT)[: options.problems]
    figures: dict[str, Any] = {"problems": len(asked)}
    async with fleet() as engines:
        for temperature in (0.0, 1.0):
            for name, team in teams.items():
                results: list[JobResult] = []
                jobs = [replace(job(p), temperature=temperature) for p in asked]
                started = time.monotonic()
                await work_all(
                    Orchestrator(team, replicas.gathered(engines)), jobs, options.concurrency, results.append
                )
                summary = summarise(results)
                figures[f"{name}, {'greedy' if not temperature else 'temperature 1.0'}"] = {
                    "right": sum(bool(result.correct) for result in results),
                    "failed": summary.failed,
                    "unconfirmed": summary.unconfirmed,
                    "wrong_but_confirmed": sum(r.confirmed is True and not r.correct for r in results),
                    "seconds": round(time.monotonic() - started, 1),
                    "tokens": sum(used.completion_tokens for used in summary.usage.values()),
                }
                progress(f"team: {name}, temperature {temperature}: {summary.accuracy:.1%}")
    return figures


def write_problems(options: argparse.Namespace) -> dict[str, Any]:
    """Write 500 held-out problems with their answers, for `troupe solve --file`."""
    rng = random.Random("held-out problems")
    drawn: dict[str, int] = {}
    while len(drawn) < 500:
        problem = sampling.draw_problem(rng)
        if sampling.is_held_out(problem.text):
            drawn[problem.text] = problem.expression.value
    lines = [json.dumps({"id": f"h{n}", "problem": p, "answer": a}) for n, (p, a) in enumerate(drawn.items(), start=1)]
    HELD_OUT.write_text("\n".join(lines) + "\n")
    return {"written": str(HELD_OUT.relative_to(ROOT)), "problems": len(lines)}


@asynccontextmanager
async def fleet() -> AsyncIterator[dict[str, EngineHandle]]:
    """Start the embedded engines, with logs in a new run folder."""
    folder = run_folder.create()
    logs.log_to(folder)
    embedded = config.load("embedded")
    async with Fleet(embedded.engines, folder, device_bytes=embedded.device.memory_bytes) as started:
        yield started.engines


def job(problem: problems.Problem) -> Job:
    return Job(problem.id, problem.problem, problem.expected, compare=problem.compare)


def spread(values: list[float]) -> dict[str, float]:
    """Return the median and the range of some values."""
    figures = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: round(value, 4) for name, value in figures.items()}


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


MEASURES: dict[str, Callable[[argparse.Namespace], Any]] = {
    "start": measure_start,
    "overhead": measure_overhead,
    "streaming": measure_streaming,
    "orchestrator": measure_orchestrator,
    "traces": measure_traces,
    "team": measure_team,
    "problems": write_problems,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(MEASURES))
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each measurement (default: 5)")
    parser.add_argument("--problems", type=int, help="number of held-out problems (default: 500 for team, else 200)")
    parser.add_argument("--calls", type=int, default=100_000, help="role calls of orchestrator (default: 100000)")
    parser.add_argument("--concurrency", type=int, default=32, help="jobs that run at once (default: 32)")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    options = parser.parse_args()
    options.problems = options.problems or {"overhead": 200, "streaming": 200}.get(options.what, 500)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = MEASURES[options.what](options)
    record = asyncio.run(found) if asyncio.iscoroutine(found) else found
    print(json.dumps(record) if options.json else json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
