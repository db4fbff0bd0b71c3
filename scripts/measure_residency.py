"""Measure how long engines take to wake.

    python scripts/measure_residency.py wake    from the decision to the first token, on the CPU

Each engine sleeps and wakes in turn. The weights come from the page cache (warm) or from the disk (dropped). Results
are medians and ranges over the repeats.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from agents.role import Message
from runtime import config
from runtime.engines.fleet import Fleet
from runtime.engines.handle import EngineHandle
from runtime.engines.replicas import Replicas
from runtime.engines.request import GenerateRequest
from runtime.engines.sharing import Sharing
from runtime.engines.spec import EngineSpec
from scripts.measure import progress, spread
from scripts.tiny_model import write_chat_model

LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 5,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}
"""The shape of a model of about 1 GB: 0.24 billion weights of 4 bytes."""


async def measure_wake(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the wake of the embedded planner and of a model of 1 GB, with their weights in the page cache or not."""
    with tempfile.TemporaryDirectory() as folder:
        progress("writing a model of 1 GB")
        large = write_chat_model(Path(folder) / "large", **LARGE)
        planner = config.load("embedded").engines["planner"]
        specs = {
            "planner": planner,
            "1 GB": EngineSpec(model=str(large), gpu_memory_utilization=0.9, max_num_seqs=16, enforce_eager=True),
        }
        gigabytes = {name: sum(file.stat().st_size for file in _weights(spec)) / 1e9 for name, spec in specs.items()}
        measured: dict[str, Any] = {}
        async with Fleet(specs, Path(folder) / "run", device_bytes=8 << 30, one_at_a_time=True) as fleet:
            for name, spec in specs.items():
                for cache in ("warm", "dropped"):
                    progress(f"{name}, page cache {cache}")
                    seconds = [
                        await _wake(fleet.engines[name], fleet.sharing, spec, cache == "dropped")
                        for _ in range(options.repeats)
                    ]
                    measured[f"{name}, page cache {cache}"] = {
                        "gigabytes": round(gigabytes[name], 3),
                        "first_token_s": spread([first for first, _ in seconds]),
                        "sleep_s": spread([sleep for _, sleep in seconds]),
                    }
        return measured


async def _wake(engine: EngineHandle, sharing: Sharing, spec: EngineSpec, drop: bool) -> tuple[float, float]:
    """Return the seconds from the decision to wake to the first token, and those to sleep again."""
    if drop:
        _drop_from_page_cache(spec)
    began_s = time.perf_counter()
    await sharing.admit(engine.name, engine.limits.smallest_bytes)
    await engine.wake()
    request = GenerateRequest(f"{began_s}", (Message("user", "12+7"),), 0.0, 1.0, 8)
    async for _ in Replicas(engine.name, [engine]).generate(request):
        break
    first_s = time.perf_counter() - began_s
    began_s = time.perf_counter()
    await engine.sleep()
    await sharing.release(engine.name, 0)
    return first_s, time.perf_counter() - began_s


def _drop_from_page_cache(spec: EngineSpec) -> None:
    os.sync()
    for file in _weights(spec):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _weights(spec: EngineSpec) -> list[Path]:
    return list(Path(spec.model).glob("*.safetensors"))


def main() -> None:
    """Run the measure that the command line names, and print its result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["wake"])
    parser.add_argument("--repeats", type=int, default=10, help="wakes for each figure (default: 10)")
    options = parser.parse_args()
    print(json.dumps(asyncio.run(measure_wake(options)), indent=1))


if __name__ == "__main__":
    main()
