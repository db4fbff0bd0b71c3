"""Measure what several devices gain and cost. The figures are in runtime/devices/README.md.

    python scripts/measure_devices.py scale     jobs a second on 1, 2 and 4 modelled devices
    python scripts/measure_devices.py twice     two modelled devices against one that is twice as large
    python scripts/measure_devices.py change    job times while a replica comes and goes
    python scripts/measure_devices.py decide    microseconds to choose a replica, milliseconds to decide a placement
    python scripts/measure_devices.py sessions  conversations that stay at a replica, or go to the least loaded one

The first three run on modelled engines and a clock that jumps, so that the two cores of a machine limit nothing. The
last one runs real engines with the chat model that scripts/chat_model.py makes.
"""

import argparse
import asyncio
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from agents.arithmetic import sampling
from agents.role import Message
from runtime import config
from runtime.assembly import RunningTeam, start_team
from runtime.bench import workload
from runtime.bench.output import Output
from runtime.bench.plan import Plan, phase_teams
from runtime.bench.runner import Rival
from runtime.cli.simulate import Simulated, run_simulated
from runtime.config import PolicyChoice
from runtime.control.contained_policy import ContainedPolicies
from runtime.devices.rebalancing import DeviceLoad, EngineRange, PlacementView, ReplicaView, decide
from runtime.engines.replicas import Replicas
from runtime.engines.request import GenerateRequest
from runtime.jobs.batch import work_all
from runtime.jobs.job import Job, JobResult
from runtime.jobs.team import assemble
from runtime.simulation import load, virtual_time
from runtime.simulation.assembly import start_modelled_team
from runtime.simulation.calls import reply
from scripts.measure import progress, spread

OPEN_JOBS = 64
"""Jobs that are kept open on each device."""
JOBS = 1500
"""Jobs on each device."""
KV_CACHE_BYTES = 64 << 20
CHANGE_EVERY_S = 5.0


async def _worked(devices: int, seed: int, change: Callable[[RunningTeam], Any] | None = None) -> dict[str, float]:
    """Work jobs on modelled devices. Return the jobs a second and the 95th percentile of their times, in seconds.

    The process that sends the requests costs nothing. `change` runs beside the jobs.
    """
    found = config.load("embedded")
    model = load.read("embedded")
    free = {name: engine.model_copy(update={"call_s": 0.0}) for name, engine in model.engines.items()}
    model = model.model_copy(update={"engines": free})
    scripts = dict.fromkeys(model.engines, reply)
    team = assemble(found)
    rng = random.Random(seed)
    jobs = [Job(str(n), sampling.draw_expression(rng).text) for n in range(JOBS * devices)]
    results: list[JobResult] = []
    clock = asyncio.get_running_loop().time
    placed = None if change is None else {str(number): tuple(free) for number in range(devices)}
    async with load.devices(model, scripts, KV_CACHE_BYTES, devices, 1, placed=placed) as started:
        with ContainedPolicies(found.control.policy, threads=False) as policies:
            async with RunningTeam(team, started, found.control, policies) as running:
                changing = None if change is None else asyncio.create_task(change(running))
                began_s = clock()
                await work_all(running.orchestrator, jobs, OPEN_JOBS * devices, results.append)
                seconds = clock() - began_s
                if changing is not None:
                    changing.cancel()
                    await asyncio.wait([changing])
    assert not any(result.error for result in results), next(result.error for result in results if result.error)
    times = sorted(sum(used.seconds for used in result.usage.values()) for result in results)
    return {"jobs_per_s": len(results) / seconds, "p95_s": times[int(0.95 * len(times))], "seconds": seconds}


def measure_scale(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the jobs a second on more devices, as parts of as many times those on one."""
    measured: dict[int, list[float]] = {1: [], 2: [], 4: []}
    for repeat, devices in itertools.product(range(options.repeats), measured):
        measured[devices].append(virtual_time.run(_worked(devices, repeat))["jobs_per_s"])
        progress(f"{devices} devices, repeat {repeat + 1}: {measured[devices][-1]:.1f} jobs/s")
    one = measured[1]
    return {
        f"{devices} devices, of {devices} times one": spread(
            [rate / (devices * alone) for rate, alone in zip(rates, one, strict=True)]
        )
        for devices, rates in measured.items()
    }


async def _change(running: RunningTeam) -> None:
    """Remove the solver's replica on one device, and add it again, over and over."""
    for _ in itertools.count():
        await asyncio.sleep(CHANGE_EVERY_S)
        await running.devices["1"].remove("solver@1")
        await asyncio.sleep(CHANGE_EVERY_S)
        await running.devices["1"].add("solver@1")


async def _without(running: RunningTeam) -> None:
    """Remove the solver's replica on one device for good."""
    await running.devices["1"].remove("solver@1")


async def _nothing(running: RunningTeam) -> None:
    del running


def measure_change(options: argparse.Namespace) -> dict[str, Any]:
    """Measure jobs on two devices: unchanged, while a replica comes and goes, and without that replica."""
    figures: dict[str, dict[str, list[float]]] = {}
    changes = {"both replicas": _nothing, "one comes and goes": _change, "one replica": _without}
    for repeat, (name, change) in itertools.product(range(options.repeats), changes.items()):
        for figure, value in virtual_time.run(_worked(2, repeat, change)).items():
            figures.setdefault(name, {}).setdefault(figure, []).append(value)
        progress(f"{name}, repeat {repeat + 1}")
    return {name: {figure: spread(values) for figure, values in each.items()} for name, each in figures.items()}


def measure_twice(options: argparse.Namespace) -> dict[str, Any]:
    """Measure `phases` on two devices and on one with twice the memory and twice the engines at full speed at once.

    Return the 95th percentile of job times on the two, relative to the one.
    """
    found, source = config.load("embedded-scarce"), workload.load("phases")
    model = load.read(options.constants)
    source = source.at_rate(model.rate_factors.get(source.name, 1))
    budget_bytes = model.kv_cache_bytes or int(found.device.kv_cache_memory_bytes or 0)
    teams = {phase: team.without_tools() for phase, team in phase_teams(found, source).items()}
    ratios: dict[str, Any] = {}
    for share in options.loads:
        results = {}
        for devices, size in ((1, 2), (2, 1)):
            sized = model.model_copy(update={"lanes": size * model.lanes, "kv_cache_bytes": size * budget_bytes})
            simulated = Simulated(
                assemble(found).without_tools(), teams, sized, reply, size * budget_bytes, {}, devices
            )
            with tempfile.TemporaryDirectory() as folder:
                rival = Rival("turns", PolicyChoice(name="turns"))
                plan = Plan(found, source, [rival], (2 * share,), options.repeats, False, Path(folder) / "out")
                with Output(plan.folder) as output:
                    runs = virtual_time.run(run_simulated(plan, simulated, output))
            results[devices] = [run.metrics for run in runs]
        ratios[f"load {share:g} of each"] = {
            figure: spread([two[figure] / one[figure] for two, one in zip(results[2], results[1], strict=True)])
            for figure in ("p95_jct_s", "output_throughput")
        }
        progress(f"load {share:g}: {ratios[f'load {share:g} of each']}")
    return ratios


def measure_decide(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the processor time of choosing a replica among many, and of deciding a placement on many devices."""
    chosen: dict[str, Any] = {}
    for count in (1, 2, 8, 100):
        microseconds = asyncio.run(_choose(count, options.repeats))
        chosen[f"choose a replica on {count} devices, us"] = spread(microseconds)
    for count in (10, 100, 1000):
        milliseconds = []
        for repeat in range(options.repeats):
            view = _placement(count, random.Random(repeat))
            began_s = time.process_time()
            actions = decide(view)
            milliseconds.append((time.process_time() - began_s) * 1e3)
            assert actions
        chosen[f"decide about {count} devices, ms"] = spread(milliseconds)
    return chosen


async def _choose(devices: int, repeats: int) -> list[float]:
    """Return the microseconds of choosing one of an engine's replicas, of which each device has one, in each repeat."""
    found = config.load("embedded")
    async with start_modelled_team(found, assemble(found), devices=devices) as running:
        replicas = running.orchestrator.caller._engines["solver"]
        assert isinstance(replicas, Replicas)
        with ExitStack() as requests:
            for engine in running.engines.values():
                requests.enter_context(engine.usage.request(0))
            microseconds = []
            for _ in range(repeats):
                began_s = time.process_time()
                for _ in range(2000):
                    replicas._replica_for_next(())
                microseconds.append((time.process_time() - began_s) * 1e6 / 2000)
            return microseconds


def _placement(count: int, rng: random.Random) -> PlacementView:
    """Return a view of three engines with a replica each on half of the devices, under random loads."""
    names = [str(number) for number in range(count)]
    engines, replicas = {}, []
    for engine in ("planner", "solver", "critic"):
        on = rng.sample(names, count // 2)
        replicas += [ReplicaView(f"{engine}@{name}", engine, name, rng.randrange(200), 0.0) for name in on]
        engines[engine] = EngineRange(1, count, 1, 1.0, frozenset(names) - {*on})
    return PlacementView(replicas, engines, dict.fromkeys(names, DeviceLoad(10, 60.0, 60.0)))


TURNS, CONVERSATIONS, TURN_WORDS, REPLY_TOKENS = 6, 6, 80, 16


def measure_sessions(options: argparse.Namespace) -> dict[str, Any]:
    """Measure conversations on two replicas, with and without sessions, in turn."""
    figures: dict[str, dict[str, list[float]]] = {}

    async def measure() -> None:
        found = config.load("cpu-chat")
        chat = found.engines["chat"].model_copy(update={"replicas": "all", "max_num_seqs": 8})
        found = found.model_copy(update={"devices": (0, 1), "engines": {"chat": chat}})
        with tempfile.TemporaryDirectory() as folder:
            async with start_team(found, assemble(found), Path(folder)) as running:
                for repeat, sessions in itertools.product(range(-1, options.repeats), (True, False)):
                    measured = await _converse(running, sessions, repeat)
                    if repeat < 0:
                        continue  # the first run fits the costs of steps
                    name = "sessions" if sessions else "least wait"
                    for figure, value in measured.items():
                        figures.setdefault(name, {}).setdefault(figure, []).append(value)
                    progress(f"{name}, repeat {repeat + 1}: {measured}")

    asyncio.run(measure())
    return {name: {figure: spread(values) for figure, values in each.items()} for name, each in figures.items()}


async def _converse(running: RunningTeam, sessions: bool, repeat: int) -> dict[str, float]:
    """Hold conversations at the same time, each of which sends its whole history with every turn."""
    first_s: list[float] = []
    cached: list[float] = []
    rng = random.Random(f"{repeat} {sessions}")  # so that no run finds the prefixes of another

    async def one(number: int) -> None:
        messages: list[Message] = []
        for turn in range(TURNS):
            words = " ".join(str(rng.randrange(1000)) for _ in range(TURN_WORDS))
            messages.append(Message("user", words))
            request = GenerateRequest(
                f"{repeat}/{sessions}/{number}/{turn}",
                tuple(messages),
                0.0,
                1.0,
                REPLY_TOKENS,
                session=f"{repeat}/{number}" if sessions else None,
                sampling_params={"ignore_eos": True},
            )
            began_s, text = time.monotonic(), ""
            async for chunk in running.generate("chat", request):
                if not text:
                    first_s.append(time.monotonic() - began_s)
                    cached.append((chunk.cached_tokens or 0) / chunk.prompt_tokens)
                text += chunk.text or " "
            messages.append(Message("assistant", text))

    began_s = time.monotonic()
    await asyncio.gather(*(one(number) for number in range(CONVERSATIONS)))
    seconds = time.monotonic() - began_s
    later = len(cached) // TURNS  # those of the first turns find nothing
    first_s.sort()
    return {
        "first token, p50, s": first_s[len(first_s) // 2],
        "first token, p95, s": first_s[int(0.95 * len(first_s))],
        "part of the prompts that was cached": sum(cached) / (len(cached) - later),
        "all conversations, s": seconds,
    }


MEASURES: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "scale": measure_scale,
    "twice": measure_twice,
    "change": measure_change,
    "decide": measure_decide,
    "sessions": measure_sessions,
}


def main() -> None:
    """Run the measure that the command line names, and print its result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(MEASURES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 1.0], help="for twice: loads of each device")
    parser.add_argument("--constants", default="embedded", help="for twice: constants of the engines")
    options = parser.parse_args()
    print(json.dumps(MEASURES[options.what](options), indent=1))


if __name__ == "__main__":
    main()
