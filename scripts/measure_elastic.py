"""Measure what elastic engines do and cost, on real vLLM engines. The figures in the documentation come from here.

    python scripts/measure_elastic.py grants    apply random grants to an idle and a loaded engine: lost and changed
                                                replies, duration of a resize, and of a restart in comparison
    python scripts/measure_elastic.py memory    shrink KV caches of 64 MiB to 4 GiB: resident memory before and after
    python scripts/measure_elastic.py price     compare throughput and inter-token latency with stock vLLM
    python scripts/measure_elastic.py trade     let two engines trade memory under load, and sample their memory
    python scripts/measure_elastic.py kill      kill each engine with SIGKILL under load
    python scripts/measure_elastic.py blocks    resize a pool of 100,000 blocks without an engine: processor time

The engines run a small chat model with random weights, in float32 on the CPU. Results are medians and ranges. Variants
that are compared run alternately in one process.
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
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from agents.role import Message
from runtime import logs, run_folder
from runtime.engines import temp_folder
from runtime.engines.fleet import Fleet
from runtime.engines.grant import Applied, Deferred, Grant, Rejected
from runtime.engines.handle import EngineHandle, EngineState
from runtime.engines.launcher import prepare_process
from runtime.engines.replicas import Replicas
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
    """Send the same greedy requests undisturbed and under random grants, with prefix caching and without."""
    record: dict[str, Any] = {}
    async with fleet({"cached": spec(), "plain": spec(vllm={"enable_prefix_caching": False})}) as running:
        for name, engine in running.engines.items():
            record[name] = await under_random_grants(engine, options.grants, options.requests)
            progress(f"{name}: {record[name]}")
    record["restart_s"] = spread([await restart() for _ in range(options.repeats)])
    return record


async def under_random_grants(engine: EngineHandle, grants: int, requests: int) -> dict[str, Any]:
    """Count lost and changed replies of an engine under random grants, and time its resizes, idle and under load."""
    expected = await replies(engine, requests)
    idle = [await timed_grant(engine, random.Random(n)) for n in range(grants // 5)]
    loaded, actual = await loaded_grants(engine, grants, requests)
    return {
        "grants": len(loaded),
        "requests": len(actual),
        "lost": sum(not reply for reply in actual),
        "identical": sum(reply == expected[i % requests] for i, reply in enumerate(actual)),
        "preempted": sum(applied.preempted for _, applied in loaded),
        "idle": resize_times(idle),
        "loaded": resize_times(loaded),
    }


async def loaded_grants(
    engine: EngineHandle, grants: int, requests: int
) -> tuple[list[tuple[float, Applied]], list[Reply]]:
    """Apply random grants in sequence while the requests repeat. Return the timed grants, and all replies."""
    timed: list[tuple[float, Applied]] = []

    async def apply_grants() -> None:
        rng = random.Random(0)
        for _ in range(grants):
            timed.append(await timed_grant(engine, rng))
            await asyncio.sleep(rng.uniform(0, 0.05))

    applying = asyncio.create_task(apply_grants())
    all_replies: list[Reply] = []
    while not applying.done():
        all_replies += await replies(engine, requests)
    await applying
    return timed, all_replies


async def timed_grant(engine: EngineHandle, rng: random.Random) -> tuple[float, Applied]:
    """Apply one random grant. Return the seconds until the engine answered, and the outcome once it was applied."""
    limits = engine.limits
    grant = Grant(
        limits.share(rng.choice([1, 2, 4, 8, 32]) * limits.kv_floor_bytes) + 1e-9,
        rng.choice([1, 4, 16, limits.seqs_ceiling]),
        rng.choice([64, 512, limits.step_tokens_ceiling]),
    )
    started = time.perf_counter()
    outcome = await engine.resize(grant, rng.choice([0, 0, 0.05]))
    seconds = time.perf_counter() - started
    settled = await outcome.settled if isinstance(outcome, Deferred) else outcome
    assert isinstance(settled, Applied), settled
    return seconds, settled


def resize_times(timed: list[tuple[float, Applied]]) -> dict[str, Any]:
    """Return how long resizes stalled the engine's steps, and how long the caller waited for those not deferred."""
    return {
        "stall_ms": percentiles([applied.stall_seconds for _, applied in timed]),
        "seen_ms": percentiles([seconds for seconds, applied in timed if applied.seconds <= seconds]),
        "moved_mib": round(statistics.mean(applied.moved_bytes for _, applied in timed) / MIB, 1),
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Return the median, the 99th percentile and the maximum in milliseconds."""
    ordered = sorted(seconds)
    points = {"p50": ordered[len(ordered) // 2], "p99": ordered[len(ordered) * 99 // 100], "longest": ordered[-1]}
    return {name: round(value * 1000, 2) for name, value in points.items()}


async def restart() -> float:
    """Return the seconds from a kill to the next reply: the cost of a new configuration without live resizing."""
    async with fleet({"one": spec()}) as running:
        started = time.perf_counter()
        running.engines["one"].kill()
        first = await reply(running.engines["one"], 1)
        assert first
        return time.perf_counter() - started


async def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Fill a KV cache of each size, shrink it to its floor, and compare the resident memory of the engine's process."""
    shape = {"num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}
    # This shape takes 256 KiB per token and 8 MiB per block.
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
    """Run the same load alternately on an elastic engine and on stock vLLM with the same settings."""
    chosen = spec(kv_cache_memory_bytes=64 * MIB, max_num_seqs=64)
    async with elastic_and_stock(chosen, 2 * GIB) as engines:
        return await price(engines, options.repeats)


@asynccontextmanager
async def elastic_and_stock(chosen: EngineSpec, device_bytes: int | None) -> AsyncIterator[list[EngineHandle]]:
    """Start an elastic engine, and two stock engines with vLLM's own worker and scheduler and a KV cache of equal size.

    The second stock engine is a control: the difference of the two is noise.
    """
    folder = run_folder.create()
    logs.log_to(folder)
    async with AsyncExitStack() as stack:
        place = stack.enter_context(temp_folder.folder())
        prepare_process([chosen, chosen], folder, place)
        from runtime.engines import vllm_engine  # must follow prepare_process

        class StockEngine(vllm_engine.VllmEngine):
            async def _take_first_grant(self) -> None:
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
    """Return the ratios to the stock engine with 1, 16 and 64 sequences. The engines alternate in every round."""
    record: dict[str, Any] = {}
    for concurrency in (1, 16, 64):
        times: dict[str, list[dict[str, float]]] = {engine.name: [] for engine in engines}
        for repeat in range(repeats + 1):
            first = repeat % len(engines)
            for engine in engines[first:] + engines[:first]:
                figures = await throughput(engine, concurrency, repeat)
                if repeat:  # the first round is a warm-up
                    times[engine.name].append(figures)
        record[f"{concurrency} sequences"] = {
            f"{name}_{figure}": spread(
                [a[figure] / b[figure] for a, b in zip(times[name], times["stock"], strict=True)]
            )
            for name in ("elastic", "control")
            for figure in ("tokens_per_s", "itl_p50_s")
        } | {"stock_tokens_per_s": spread([s["tokens_per_s"] for s in times["stock"]])}
        progress(f"{concurrency} sequences, ratio to stock: {record[f'{concurrency} sequences']}")
    return record


async def throughput(engine: EngineHandle, concurrency: int, repeat: int) -> dict[str, float]:
    """Return tokens per second with `concurrency` sequences at a time, and the median inter-token latency."""
    gaps_s: list[float] = []
    token_count = 0

    async def run_request(number: int) -> None:
        nonlocal token_count
        last_s = 0.0
        content = long_prompt(number, 40)
        async for chunk in engine.generate(request(content, f"{repeat}/{number}", max_tokens=100)):
            token_count += len(chunk.token_ids)
            if last_s:
                gaps_s.append(chunk.time_s - last_s)
            last_s = chunk.time_s

    started = time.perf_counter()
    rounds = max(1, 128 // concurrency) if concurrency > 1 else 6
    for index in range(rounds):
        await asyncio.gather(*(run_request(index * concurrency + n) for n in range(concurrency)))
    return {"tokens_per_s": token_count / (time.perf_counter() - started), "itl_p50_s": statistics.median(gaps_s)}


async def measure_trade(options: argparse.Namespace) -> dict[str, Any]:
    """Let two engines trade memory under load, while a thread samples the sum of their resident memory."""
    async with fleet({"left": spec(), "right": spec()}) as running:
        processes = [engine_process(running, name) for name in running.engines]
        return await trade(
            running, options.seconds, options.requests, lambda: sum(resident(process) for process in processes)
        )


async def trade(running: Fleet, seconds: float, requests: int, held_bytes: Callable[[], int]) -> dict[str, Any]:
    """Divide the device at random among its engines, again and again for `seconds`, while all of them run requests.

    A thread samples `held_bytes`, the memory that the engines hold, 20 times per second.
    """
    engines = running.engines
    expected = {name: await replies(engine, requests) for name, engine in engines.items()}
    budget_bytes = running.sharing.ledger.budget_bytes
    samples_bytes: list[int] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.05):
            samples_bytes.append(held_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    counts = {"answers": 0, "lost": 0, "changed": 0}

    async def load(name: str) -> None:
        while not stop.is_set():
            count(counts, await replies(engines[name], requests), expected[name])

    loading = asyncio.gather(*map(load, engines))
    rng = random.Random(0)
    decisions = rejected = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        outcomes = await running.sharing.resize(division(engines, rng), grace_s=0.05)
        rejected += sum(isinstance(outcome, Rejected) for outcome in outcomes.values())
        for outcome in outcomes.values():
            if isinstance(outcome, Deferred):
                await outcome.settled
        assert sum(running.sharing.ledger.held.values()) <= budget_bytes
        decisions += 1
    stop.set()
    await loading
    sampler.join()
    return {
        "seconds": seconds,
        "decisions": decisions,
        "rejected": rejected,
        **counts,
        "budget_mib": budget_bytes // MIB,
        "samples": len(samples_bytes),
        "most_held_mib": max(samples_bytes) // MIB,
    }


def count(counts: dict[str, Any], actual: Sequence[Reply], expected: Sequence[Reply]) -> None:
    """Add replies to the counts of answers, of lost ones, and of those that differ from the expected ones."""
    counts["answers"] += len(actual)
    counts["lost"] += sum(not reply for reply in actual)
    counts["changed"] += sum(bool(reply) and reply != wanted for reply, wanted in zip(actual, expected, strict=True))


def division(engines: Mapping[str, EngineHandle], rng: random.Random) -> dict[str, Grant]:
    """Return grants that divide 98% of the device: each engine gets its floor and a random part of the rest."""
    floors = {name: engine.limits.share(engine.limits.kv_floor_bytes) + 1e-6 for name, engine in engines.items()}
    weights = {name: rng.random() for name in engines}
    rest = (0.98 - sum(floors.values())) / sum(weights.values())
    return {
        name: Grant(floors[name] + rest * weights[name], engine.limits.seqs_ceiling, engine.limits.step_tokens_ceiling)
        for name, engine in engines.items()
    }


async def measure_kill(options: argparse.Namespace) -> dict[str, Any]:
    """Kill each engine in turn under load, and check that every request gets one reply, the same as without a kill."""
    async with fleet({"left": spec(), "right": spec()}) as running:
        return await kill_each(running, options.repeats, options.requests)


async def kill_each(running: Fleet, repeats: int, requests: int) -> dict[str, Any]:
    """Kill every engine of a fleet in turn with SIGKILL while all of them run requests."""
    record: dict[str, Any] = {}
    engines = running.engines
    callers = [Replicas(name, [engine]) for name, engine in engines.items()]  # they repeat what an engine loses
    expected = [await replies(caller, requests) for caller in callers]
    for repeat in range(repeats):
        for name, engine in engines.items():
            loading = asyncio.gather(*(replies(caller, requests) for caller in callers))
            await asyncio.sleep(0.4)
            killed_s = time.perf_counter()
            engine_process(running, name).kill()
            await until(engine, lambda state: state is not EngineState.READY)
            await until(engine, lambda state: state is EngineState.READY)
            down_s = time.perf_counter() - killed_s
            actual = await loading
            counts = record.setdefault(name, {"serves_again_s": [], "answers": 0, "lost": 0, "changed": 0})
            counts["serves_again_s"].append(down_s)
            for ours, theirs in zip(actual, expected, strict=True):
                count(counts, ours, theirs)
            done_s = time.perf_counter() - killed_s
            progress(f"{repeat} {name}: serves again after {down_s:.1f} s, all requests done after {done_s:.1f} s")
    for counts in record.values():
        counts["serves_again_s"] = spread(counts["serves_again_s"])
    return record


async def until(engine: EngineHandle, holds: Callable[[EngineState], bool]) -> None:
    """Wait until the state of an engine satisfies `holds`."""
    while not holds(engine.stats().state):  # noqa: ASYNC110 (engines have no event for their state)
        await asyncio.sleep(0.01)


def spec(shape: Mapping[str, Any] | None = None, **changes: Any) -> EngineSpec:
    """Return the specification of an engine with a tiny chat model. `shape` changes the model, `changes` the engine."""
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
    """Start engines that share `device_bytes`, or the whole device if it is None. They log to a new run folder."""
    folder = run_folder.create()
    logs.log_to(folder)
    async with Fleet(specs, folder, device_bytes=device_bytes) as running:
        yield running


def request(content: str, identity: str, **changes: Any) -> GenerateRequest:
    values: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 8} | changes
    return GenerateRequest(f"{identity}/{time.monotonic_ns()}", (Message("user", content),), **values)


async def reply(engine: EngineHandle | Replicas, number: int) -> Reply:
    """Send request `number` and return the tokens of its reply. The same number always makes the same request.

    A fifth of the requests have a JSON schema, and half share a prefix.
    """
    rng = random.Random(number)
    prefix = "You are one of a team of agents that works problems together. " * 2 if number % 2 else ""
    content = prefix + " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))
    changes: dict[str, Any] = {"max_tokens": 20 + number % 100}
    if number % 5 == 0:
        changes = {"schema": SCHEMA, "max_tokens": 100}
    chunks = engine.generate(request(content, str(number), **changes))
    return tuple([token async for chunk in chunks for token in chunk.token_ids])


async def replies(engine: EngineHandle | Replicas, count: int) -> list[Reply]:
    return await asyncio.gather(*(reply(engine, number) for number in range(count)))


async def stream(engine: EngineHandle, content: str) -> None:
    async for _ in engine.generate(request(content, "fill")):
        pass


def long_prompt(number: int, characters: int) -> str:
    """Return a prompt of as many tokens as characters. Prompts differ from the start, so prefix caching never hits."""
    return "".join(random.Random(number).choices("abcdefghijklmnopqrstuvwxyz ", k=characters))


async def applied(engine: EngineHandle, kv_cache_bytes: int) -> Applied:
    """Resize the KV cache of an engine without a grace period, and return the outcome."""
    limits = engine.limits
    outcome = await engine.resize(
        Grant(limits.share(kv_cache_bytes) + 1e-9, limits.seqs_ceiling, limits.step_tokens_ceiling)
    )
    assert isinstance(outcome, Applied), outcome
    return outcome


def engine_process(running: Fleet, name: str) -> psutil.Process:
    """Return the process that writes to an engine's log. Exits if there is none."""
    log = running.log(name).resolve()
    for process in psutil.Process().children(recursive=True):
        if any(Path(f"/proc/{process.pid}/fd/{fd}").resolve() == log for fd in (1, 2)):
            return process
    raise SystemExit(f"no process writes to {log}")


def resident(process: psutil.Process) -> int:
    """Return the resident bytes that only this process holds (USS, from its smaps)."""
    return int(process.memory_full_info().uss)


async def measure_blocks(options: argparse.Namespace) -> dict[str, Any]:
    """Shrink a pool of 100,000 free blocks to the smallest, and grow it again, in milliseconds of processor time.

    vLLM's steps wait for this part of a resize. The blocks are all in the prefix cache, or none is.
    """
    return {name: resize_pool(cached, options.repeats) for name, cached in (("cached", True), ("uncached", False))}


def resize_pool(cached: bool, repeats: int) -> dict[str, Any]:
    from runtime.engines.elastic.pool import ElasticBlockPool  # imports vLLM, which takes seconds

    count = 100_000
    times_ms: dict[str, list[float]] = {"shrink_ms": [], "grow_ms": []}
    for _ in range(repeats):
        pool = ElasticBlockPool(count, enable_caching=True, hash_block_size=16)
        if cached:
            blocks = pool.get_new_blocks(count - 1)
            for block in blocks:
                pool._insert_block_hash(block.block_id.to_bytes(32, "big"), block, 16)
            pool.free_blocks(blocks)
        for name, capacity in (("shrink_ms", 2), ("grow_ms", count)):
            started_s = time.process_time()
            pool.set_capacity(capacity)
            times_ms[name].append(1000 * (time.process_time() - started_s))
    return {name: spread(values) for name, values in times_ms.items()}


MEASURES: dict[str, Callable[[argparse.Namespace], Coroutine[Any, Any, dict[str, Any]]]] = {
    "grants": measure_grants,
    "memory": measure_memory,
    "price": measure_price,
    "trade": measure_trade,
    "kill": measure_kill,
    "blocks": measure_blocks,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(MEASURES), help="the measurement to run")
    parser.add_argument("--grants", type=int, default=1000, help="random grants per loaded engine (default: 1000)")
    parser.add_argument("--requests", type=int, default=150, help="requests in flight at a time (default: 150)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="restarts, rounds, kills or resizes to measure (default: 5)"
    )
    parser.add_argument("--seconds", type=float, default=60, help="duration of trade (default: 60)")
    parser.add_argument("--json", action="store_true", help="print the record as one line of JSON (default: indented)")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    record = asyncio.run(MEASURES[options.what](options))
    print(json.dumps(record) if options.json else json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
