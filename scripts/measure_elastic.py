"""What being elastic does and costs, on real vLLM engines: the figures of the README, each by a command.

    python scripts/measure_elastic.py grants    random grants on a loaded engine: what is lost, what changes, how long
                                                a resize takes, idle and loaded, and what a restart would have taken
    python scripts/measure_elastic.py memory    resident memory before and after, for 64 MiB to 4 GiB
    python scripts/measure_elastic.py price     throughput and inter-token latency against stock vLLM
    python scripts/measure_elastic.py trade     two engines trade memory under load; the budget, sampled from outside
    python scripts/measure_elastic.py kill      kill -9 of each engine under load

A small chat model with random weights, float32 on the CPU. Medians and ranges; what is compared runs in turn in one
process. --json prints the record.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from agents.role import Message
from runtime import logs, run_folder
from runtime.engines import temp_folder
from runtime.engines.fleet import Fleet, prepare_process
from runtime.engines.grant import Applied, Deferred, Grant, Rejected
from runtime.engines.handle import EngineHandle, EngineState
from runtime.engines.request import GenerateRequest
from runtime.engines.spec import EngineSpec
from scripts.measure import progress, spread
from scripts.tiny_model import write_chat_model

MIB, GIB = 1 << 20, 1 << 30
WORDS = ["hello", "world", "plan", "solve", "critique", "answer", "check", "step"]
SCHEMA = {
    "type": "object",
    "properties": {"accepted": {"type": "boolean"}, "reason": {"type": "string", "maxLength": 40}},
    "required": ["accepted", "reason"],
    "additionalProperties": False,
}

Reply = tuple[int, ...]


async def measure_grants(options: argparse.Namespace) -> dict[str, Any]:
    """Per engine, with prefix caching and without: the same greedy requests undisturbed and under random grants."""
    record: dict[str, Any] = {}
    async with fleet({"cached": spec(), "plain": spec(vllm={"enable_prefix_caching": False})}) as running:
        for name, engine in running.engines.items():
            record[name] = await under_random_grants(engine, options.grants, options.requests)
            progress(f"{name}: {record[name]}")
    record["restart_s"] = spread([await restart() for _ in range(options.repeats)])
    return record


async def under_random_grants(engine: EngineHandle, grants: int, requests: int) -> dict[str, Any]:
    """What an engine's replies and its resizes come to, idle and under load."""
    calm = await replies(engine, requests)
    idle = [await timed_grant(engine, random.Random(n)) for n in range(grants // 5)]
    loaded, shaken = await loaded_grants(engine, grants, requests)
    return {
        "grants": len(loaded),
        "requests": len(shaken),
        "lost": sum(not reply for reply in shaken),
        "identical": sum(reply == calm[i % requests] for i, reply in enumerate(shaken)),
        "preempted": sum(applied.preempted for _, applied in loaded),
        "idle": resize_times(idle),
        "loaded": resize_times(loaded),
    }


async def loaded_grants(
    engine: EngineHandle, grants: int, requests: int
) -> tuple[list[tuple[float, Applied]], list[Reply]]:
    """Random grants one after another while the requests are asked again and again; times, and all replies."""
    done: list[tuple[float, Applied]] = []

    async def shake() -> None:
        rng = random.Random(0)
        for _ in range(grants):
            done.append(await timed_grant(engine, rng))
            await asyncio.sleep(rng.uniform(0, 0.05))

    shaking = asyncio.create_task(shake())
    shaken: list[Reply] = []
    while not shaking.done():
        shaken += await replies(engine, requests)
    await shaking
    return done, shaken


async def timed_grant(engine: EngineHandle, rng: random.Random) -> tuple[float, Applied]:
    """One random grant: seconds until the engine answered its caller, and how it ended."""
    floor = engine.limits.kv_floor_bytes
    limits = engine.limits
    grant = Grant(
        limits.share(rng.choice([1, 2, 4, 8, 32]) * floor) + 1e-9,
        rng.choice([1, 4, 16, limits.seqs_ceiling]),
        rng.choice([64, 512, limits.step_tokens_ceiling]),
    )
    started = time.perf_counter()
    outcome = await engine.resize(grant, rng.choice([0, 0, 0.05]))
    seconds = time.perf_counter() - started
    ended = await outcome.settled if isinstance(outcome, Deferred) else outcome
    assert isinstance(ended, Applied), ended
    return seconds, ended


def resize_times(done: list[tuple[float, Applied]]) -> dict[str, Any]:
    """Milliseconds that the engine's steps waited, and that the caller did where nobody's grace was waited for."""
    return {
        "stall_ms": percentiles([applied.stall_seconds for _, applied in done]),
        "seen_ms": percentiles([seconds for seconds, applied in done if applied.seconds <= seconds]),
        "moved_mib": round(statistics.mean(applied.moved_bytes for _, applied in done) / MIB, 1),
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    points = {"p50": ordered[len(ordered) // 2], "p99": ordered[len(ordered) * 99 // 100], "longest": ordered[-1]}
    return {name: round(value * 1000, 2) for name, value in points.items()}


async def restart() -> float:
    """Seconds from killing an engine until it has answered again: what a change costs without live resizing."""
    async with fleet({"one": spec()}) as running:
        started = time.perf_counter()
        running.engines["one"].kill()
        first = await reply(running.engines["one"], 1)
        assert first
        return time.perf_counter() - started


async def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Fill a KV cache of each size, then shrink it to its floor: resident bytes of the engine's process."""
    shape = {"num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}
    # 256 KiB a token, 8 MiB a block
    wide = spec(shape, max_num_seqs=16, max_model_len=128, gpu_memory_utilization=0.3, vllm={"block_size": 32})
    record: dict[str, Any] = {}
    async with fleet({"wide": wide}, device_bytes=8 * GIB) as running:
        engine = running.engines["wide"]
        process = engine_process(running, "wide")
        for size in (64 * MIB, 256 * MIB, GIB, 4 * GIB):
            await applied(engine, size)
            tokens = size // (256 << 10)
            prompts = [long_prompt(n, 100) for n in range(tokens // 100 + 1)]
            await asyncio.gather(*(stream(engine, prompt) for prompt in prompts))
            before = resident(process)
            shrunk = await applied(engine, engine.limits.kv_floor_bytes)
            after = resident(process)
            record[f"{size // MIB} MiB"] = {
                "resident_before_mib": before // MIB,
                "resident_after_mib": after // MIB,
                "seconds": round(shrunk.seconds, 4),
                "seconds_per_gib": round(shrunk.seconds / ((before - after) / GIB), 4),
            }
            progress(f"{size // MIB} MiB: {record[f'{size // MIB} MiB']}")
    return record


async def measure_price(options: argparse.Namespace) -> dict[str, Any]:
    """The same load on an elastic engine and on stock vLLM with the same fixed settings, in turn."""
    chosen = spec(kv_cache_memory_bytes=64 * MIB, max_num_seqs=64)
    async with elastic_and_stock(chosen, 2 * GIB) as engines:
        return await price(engines, options.repeats)


@asynccontextmanager
async def elastic_and_stock(chosen: EngineSpec, device_bytes: int | None) -> AsyncIterator[list[EngineHandle]]:
    """An elastic engine, one of vLLM's own worker and scheduler with a KV cache as large, and another such: what those
    two differ by is noise."""
    folder = run_folder.create()
    logs.log_to(folder)
    async with AsyncExitStack() as stack:
        place = stack.enter_context(temp_folder.folder())
        prepare_process({"elastic": chosen, "stock": chosen}, folder, place)
        from runtime.engines import vllm_engine  # once the process is prepared

        class StockEngine(vllm_engine.VllmEngine):
            async def _begin(self) -> None:
                return None

            def _config(self) -> Any:
                config = super()._config()
                config.cache_config.kv_cache_memory_bytes = chosen.kv_cache_memory_bytes
                on_gpu = "cuda" in config.parallel_config.worker_cls
                worker = "gpu_worker.Worker" if on_gpu else "cpu_worker.CPUWorker"
                config.parallel_config.worker_cls = f"vllm.v1.worker.{worker}"
                config.scheduler_config.scheduler_cls = None
                return config

        kinds = {"elastic": vllm_engine.VllmEngine, "stock": StockEngine, "control": StockEngine}
        yield [
            await stack.enter_async_context(kind(name, chosen, folder / f"engine-{name}.log", place, device_bytes))
            for name, kind in kinds.items()
        ]


async def price(engines: list[EngineHandle], repeats: int) -> dict[str, Any]:
    """Ratios to stock, of rounds that take turns."""
    record: dict[str, Any] = {}
    for concurrency in (1, 16, 64):
        times: dict[str, list[dict[str, float]]] = {engine.name: [] for engine in engines}
        for repeat in range(repeats + 1):
            first = repeat % len(engines)
            for engine in engines[first:] + engines[:first]:
                found = await throughput(engine, concurrency, repeat)
                if repeat:  # the first round warms all
                    times[engine.name].append(found)
        record[f"{concurrency} sequences"] = {
            f"{name}_{figure}": spread(
                [a[figure] / b[figure] for a, b in zip(times[name], times["stock"], strict=True)]
            )
            for name in ("elastic", "control")
            for figure in ("tokens_per_s", "itl_p50_s")
        } | {"stock_tokens_per_s": spread([s["tokens_per_s"] for s in times["stock"]])}
        progress(f"{concurrency} sequences, to stock: {record[f'{concurrency} sequences']}")
    return record


async def throughput(engine: EngineHandle, concurrency: int, repeat: int) -> dict[str, float]:
    """Tokens a second with so many sequences at all times, and the median time between two tokens of one."""
    gaps: list[float] = []
    count = 0

    async def one(number: int) -> None:
        nonlocal count
        last = 0.0
        content = long_prompt(number, 40)
        async for chunk in engine.generate(request(content, f"{repeat}/{number}", max_tokens=100)):
            count += len(chunk.token_ids)
            if last:
                gaps.append(chunk.time_s - last)
            last = chunk.time_s

    started = time.perf_counter()
    rounds = max(1, 128 // concurrency) if concurrency > 1 else 6
    for turn in range(rounds):
        await asyncio.gather(*(one(turn * concurrency + n) for n in range(concurrency)))
    return {"tokens_per_s": count / (time.perf_counter() - started), "itl_p50_s": statistics.median(gaps)}


async def measure_trade(options: argparse.Namespace) -> dict[str, Any]:
    """Two engines pass memory back and forth under load; a thread adds up their resident memory all the while."""
    async with fleet({"left": spec(), "right": spec()}) as running:
        processes = [engine_process(running, name) for name in running.engines]
        return await trade(
            running, options.seconds, options.requests, lambda: sum(resident(process) for process in processes)
        )


async def trade(running: Fleet, seconds: float, requests: int, held: Callable[[], int]) -> dict[str, Any]:
    """Random divisions of the device among its engines, one after another, while all of them work.

    `held` says from outside how many bytes they hold; a thread asks it 20 times a second.
    """
    engines = running.engines
    calm = {name: await replies(engine, requests) for name, engine in engines.items()}
    budget = running.sharing.ledger.budget_bytes
    sampled: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            sampled.append(held())

    watching = threading.Thread(target=watch)
    watching.start()
    answers: list[bool] = []

    async def load(name: str) -> None:
        while not stop.is_set():
            found = await replies(engines[name], requests)
            answers.extend(a == b for a, b in zip(found, calm[name], strict=True))

    working = asyncio.gather(*map(load, engines))
    rng = random.Random(0)
    rounds = rejected = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        outcomes = await running.sharing.resize(division(engines, rng), grace_s=0.05)
        rejected += sum(isinstance(outcome, Rejected) for outcome in outcomes.values())
        for outcome in outcomes.values():
            if isinstance(outcome, Deferred):
                await outcome.settled
        assert sum(running.sharing.ledger.held.values()) <= budget
        rounds += 1
    stop.set()
    await working
    watching.join()
    return {
        "seconds": seconds,
        "decisions": rounds,
        "rejected": rejected,
        "answers": len(answers),
        "wrong_or_lost": answers.count(False),
        "budget_mib": budget // MIB,
        "samples": len(sampled),
        "most_held_mib": max(sampled) // MIB,
    }


def division(engines: Mapping[str, EngineHandle], rng: random.Random) -> dict[str, Grant]:
    """The whole device at random: every engine its floor, and a random part of the rest."""
    floors = {name: engine.limits.share(engine.limits.kv_floor_bytes) + 1e-6 for name, engine in engines.items()}
    weights = {name: rng.random() for name in engines}
    rest = (0.98 - sum(floors.values())) / sum(weights.values())
    return {
        name: Grant(floors[name] + rest * weights[name], engine.limits.seqs_ceiling, engine.limits.step_tokens_ceiling)
        for name, engine in engines.items()
    }


async def measure_kill(options: argparse.Namespace) -> dict[str, Any]:
    """SIGKILL to each engine in turn under load: every request answered once and as it would have been."""
    async with fleet({"left": spec(), "right": spec()}) as running:
        return await kill_each(running, options.repeats, options.requests)


async def kill_each(running: Fleet, repeats: int, requests: int) -> dict[str, Any]:
    """Kill every engine of a fleet in turn while all of them work."""
    record: dict[str, Any] = {}
    engines = running.engines
    calm = [await replies(engine, requests) for engine in engines.values()]
    for repeat in range(repeats):
        for name, engine in engines.items():
            work = asyncio.gather(*(replies(e, requests) for e in engines.values()))
            await asyncio.sleep(0.4)
            killed = time.perf_counter()
            engine_process(running, name).kill()
            await until(engine, lambda state: state is not EngineState.READY)
            await until(engine, lambda state: state is EngineState.READY)
            up = time.perf_counter() - killed
            replied = await work
            found = record.setdefault(name, {"serves_again_s": [], "requests": 0, "wrong_or_lost": 0})
            found["serves_again_s"].append(up)
            found["requests"] += sum(map(len, replied))
            found["wrong_or_lost"] += sum(
                a != b for side, wanted in zip(replied, calm, strict=True) for a, b in zip(side, wanted, strict=True)
            )
            progress(f"{repeat} {name}: serves again after {up:.1f} s, all done {time.perf_counter() - killed:.1f}")
    for found in record.values():
        found["serves_again_s"] = spread(found["serves_again_s"])
    return record


async def until(engine: EngineHandle, holds: Callable[[EngineState], bool]) -> None:
    """Wait for a state of an engine."""
    while not holds(engine.stats().state):  # noqa: ASYNC110 (it has no event for it)
        await asyncio.sleep(0.01)


def spec(shape: Mapping[str, Any] | None = None, **changes: Any) -> EngineSpec:
    """A small engine of the chat model."""
    name = "wide" if shape else "chat"
    folder = Path(tempfile.gettempdir()) / f"troupe-measure-{os.getuid()}" / name
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "model": str(write_chat_model(folder, **(shape or {}))),
        "gpu_memory_utilization": 0.45,
        "max_model_len": 512,
        "max_num_seqs": 32,
        "dtype": "float32",
        "enforce_eager": True,
    }
    return EngineSpec(**(values | changes))


@asynccontextmanager
async def fleet(specs: Mapping[str, EngineSpec], device_bytes: int | None = 2 * GIB) -> AsyncIterator[Fleet]:
    folder = run_folder.create()
    logs.log_to(folder)
    async with Fleet(specs, folder, device_bytes=device_bytes) as running:
        yield running


def request(content: str, identity: str, **changes: Any) -> GenerateRequest:
    values: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 8} | changes
    return GenerateRequest(f"{identity}/{time.monotonic_ns()}", (Message("user", content),), **values)


async def reply(engine: EngineHandle, number: int) -> Reply:
    """The reply to one of the requests, the same for the same number: a fifth held to a schema, half share a prefix."""
    rng = random.Random(number)
    beginning = "You are one of a team of agents that works problems together. " * 2 if number % 2 else ""
    content = beginning + " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))
    changes: dict[str, Any] = {"max_tokens": 20 + number % 100}
    if number % 5 == 0:
        changes = {"schema": SCHEMA, "max_tokens": 100}
    chunks = engine.generate(request(content, str(number), **changes))
    return tuple([token async for chunk in chunks for token in chunk.token_ids])


async def replies(engine: EngineHandle, count: int) -> list[Reply]:
    return await asyncio.gather(*(reply(engine, number) for number in range(count)))


async def stream(engine: EngineHandle, content: str) -> None:
    async for _ in engine.generate(request(content, "fill")):
        pass


def long_prompt(number: int, characters: int) -> str:
    """As many tokens, beginning differently for every number: nothing of it is found in the prefix cache."""
    return "".join(random.Random(number).choices("abcdefghijklmnopqrstuvwxyz ", k=characters))


async def applied(engine: EngineHandle, kv_cache_bytes: int) -> Applied:
    limits = engine.limits
    outcome = await engine.resize(
        Grant(limits.share(kv_cache_bytes) + 1e-9, limits.seqs_ceiling, limits.step_tokens_ceiling)
    )
    assert isinstance(outcome, Applied), outcome
    return outcome


def engine_process(running: Fleet, name: str) -> psutil.Process:
    """The process that writes to an engine's log."""
    log = running.log(name).resolve()
    for process in psutil.Process().children(recursive=True):
        if any(Path(f"/proc/{process.pid}/fd/{fd}").resolve() == log for fd in (1, 2)):
            return process
    raise SystemExit(f"no process writes to {log}")


def resident(process: psutil.Process) -> int:
    """Bytes that the process alone holds, from its smaps."""
    return int(process.memory_full_info().uss)


MEASURES: dict[str, Callable[[argparse.Namespace], Coroutine[Any, Any, dict[str, Any]]]] = {
    "grants": measure_grants,
    "memory": measure_memory,
    "price": measure_price,
    "trade": measure_trade,
    "kill": measure_kill,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(MEASURES))
    parser.add_argument("--grants", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=150, help="in flight at a time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--json", action="store_true", help="print the record as one line of JSON")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    record = asyncio.run(MEASURES[options.what](options))
    print(json.dumps(record) if options.json else json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
