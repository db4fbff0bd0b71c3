"""Check what only a real GPU can show, in a few minutes. Prints a table and writes a record under tests/records/.

    python scripts/gpu_acceptance.py              run all checks that fit into --minutes
    python scripts/gpu_acceptance.py pages eager  run only these checks
    python scripts/gpu_acceptance.py --rehearse   run the same calls on the CPU with tiny models, without a record

The checks use real architectures (configs/shapes) with random weights. A check fails if it raises, if replies are lost,
or if memory is not returned. It is recorded, and the next one runs. A check for which too little time is left is
recorded as skipped. The exit code is 1 if any check failed.

Needs an NVIDIA GPU with 60 GiB of free memory that no other process uses.
"""

import argparse
import asyncio
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime.engines.grant import Applied, Grant
from runtime.engines.spec import EngineSpec
from runtime.telemetry import nvml
from runtime.telemetry.nvml import NvmlSource
from runtime.telemetry.reading import DeviceReading
from scripts import measure_elastic as elastic
from scripts.measure import progress, spread
from scripts.tiny_model import write_chat_model, write_shape

MIB, GIB = 1 << 20, 1 << 30
RECORDS = ROOT / "tests" / "records"
Check = Callable[["Bench"], Awaitable[dict[str, Any]]]


class Bench:
    """The machine that is checked: a GPU, or the host in a rehearsal. `device_bytes` is None for the whole GPU."""

    def __init__(self, rehearsal: bool) -> None:
        self.rehearsal = rehearsal
        self.device_bytes = 4 * GIB if rehearsal else None
        self._folder = Path(tempfile.mkdtemp(prefix="troupe-acceptance-"))

    def spec(self, size: str, share: float, **changes: Any) -> EngineSpec:
        """Return the specification of an engine, for a model of `size`: "0.5b", "1.5b", "7b", "varied", "window".

        "varied" is 0.5b again, with weights that make replies differ. In "window", every second layer of "varied" has
        a sliding window. A rehearsal uses the same tiny model for all, with or without windows.
        """
        folder = self._folder / size
        window = _sliding_window(2 if self.rehearsal else 24) if size == "window" else {}
        if self.rehearsal:
            model = {"model": str(write_chat_model(folder, **window)), "dtype": "float32", "enforce_eager": True}
        elif size in ("varied", "window"):
            model = {"model": str(write_chat_model(folder, **_HALF_BILLION, **window)), "dtype": "bfloat16"}
        else:
            shape = ROOT / "configs" / "shapes" / f"qwen2.5-{size}.json"
            model = {"model": str(write_shape(folder, shape)), "load_format": "dummy", "dtype": "bfloat16"}
        values: dict[str, Any] = {"gpu_memory_utilization": share, "max_model_len": 2048, "max_num_seqs": 64}
        return EngineSpec(**(values | model | changes))

    def held_bytes(self) -> int:
        """Return the bytes in use on the GPU according to NVML; 0 in a rehearsal."""
        if self.rehearsal:
            return 0
        return gpu().used_bytes


def gpu() -> DeviceReading:
    """Return NVML's reading of CUDA's first device, which the engines run on."""
    from runtime.engines.elastic.cuda_driver import device_uuid

    with NvmlSource() as source:
        return next(device for device in source.read().devices if device.uuid == device_uuid(0))


_HALF_BILLION = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "initializer_range": 0.05, "torch_dtype": "bfloat16",
}  # fmt: skip


def _sliding_window(layers: int) -> dict[str, Any]:
    """Return the fields of a model's configuration that give every second layer a window, which replies soon pass."""
    kinds = ["sliding_attention", "full_attention"]
    return {"sliding_window": 32, "layer_types": [kinds[layer % 2] for layer in range(layers)]}


async def pages(bench: Bench) -> dict[str, Any]:
    """Check CUDA pages without an engine: ms per GiB by granule, NVML's figures, zeroing, and out of memory."""
    if bench.rehearsal:
        return {"skipped": "needs a GPU; the tests run it over a stub of the driver"}
    code = "import sys; sys.path.insert(0, sys.argv[1]); from scripts import gpu_acceptance as g; g.pages_alone()"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(ROOT), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    lines = output.decode().strip().splitlines()
    if process.returncode:
        raise RuntimeError("\n".join(lines[-15:]))
    return dict(json.loads(lines[-1]))


def pages_alone() -> None:
    """Run the check `pages` and print its record. Needs a process of its own, because it creates a CUDA context."""
    import torch

    from runtime.engines.elastic.cuda_pages import CudaPages
    from runtime.engines.elastic.pages import OutOfMemory

    torch.cuda.init()
    torch.cuda.synchronize()
    record: dict[str, Any] = {}
    for granule in (2 * MIB, 32 * MIB, 256 * MIB):
        cuda_pages = CudaPages(8 * GIB, granule_bytes=granule)
        before = gpu().used_bytes
        grow_s, shrink_s = [], []  # seconds per GiB
        for _ in range(5):
            started = time.perf_counter()
            cuda_pages.back(0, 4 * GIB)
            torch.cuda.synchronize()
            grow_s.append((time.perf_counter() - started) / 4)
            during = gpu().used_bytes
            view = torch.as_tensor(_Bytes(cuda_pages.address, 4 * GIB), device="cuda")
            assert int(view[:: 1 << 16].count_nonzero()) == 0, "pages are not zeroed"
            view.fill_(1)
            torch.cuda.synchronize()
            started = time.perf_counter()
            cuda_pages.release(0, 4 * GIB)
            shrink_s.append((time.perf_counter() - started) / 4)
        after = gpu().used_bytes
        assert after - before <= granule, f"{after - before} bytes are not returned"
        record[f"granule {granule // MIB} MiB"] = {
            "grow_ms_per_gib": spread([1000 * s for s in grow_s]),
            "shrink_ms_per_gib": spread([1000 * s for s in shrink_s]),
            "nvml_grew_mib": (during - before) // MIB,
            "nvml_left_mib": (after - before) // MIB,
        }
        cuda_pages.close()
    oversized = CudaPages(gpu().total_bytes + 8 * GIB, granule_bytes=256 * MIB)
    before = gpu().used_bytes
    try:
        oversized.back(0, oversized.size_bytes)
    except OutOfMemory as error:
        record["out_of_memory"] = f"{error}; {(gpu().used_bytes - before) // MIB} MiB left behind"
    assert "out_of_memory" in record, "more memory than the device has was backed"
    assert gpu().used_bytes - before <= 256 * MIB, record["out_of_memory"]
    oversized.close()
    print(json.dumps(record))


class _Bytes:
    """Device memory at an address, as uint8 [nbytes], which PyTorch wraps without a copy."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3
        }  # fmt: skip


async def start(bench: Bench) -> dict[str, Any]:
    """Start an engine whose warm-up writes more blocks than one sequence needs, and compare its figures with NVML's.

    After prompts that fill steps of `max_num_batched_tokens`, the device must hold no more than the engine reports.
    Raises RuntimeError if it holds more.
    """
    before = bench.held_bytes()
    async with elastic.fleet({"one": bench.spec("7b", 0.4, max_model_len=512)}, bench.device_bytes) as running:
        engine = running.engines["one"]
        fixed, kv_cache = engine.limits.fixed_bytes, engine.stats().kv_cache_bytes
        await asyncio.gather(*(elastic.stream(engine, elastic.long_prompt(n, 400)) for n in range(128)))
        held = bench.held_bytes() - before
    if held > fixed + kv_cache:
        raise RuntimeError(
            f"the device holds {held} bytes; the engine reports {fixed} bytes and {kv_cache} of KV cache"
        )
    return {"nvml_mib": held // MIB, "fixed_mib": fixed // MIB, "kv_cache_mib": kv_cache // MIB}


async def eager(bench: Bench) -> dict[str, Any]:
    """Apply random grants to one engine without CUDA graphs, idle and under load."""
    return await _grants(bench, enforce_eager=True)


async def graphs(bench: Bench) -> dict[str, Any]:
    """Do the same with CUDA graphs and async scheduling, vLLM's defaults."""
    return await _grants(bench)


async def window(bench: Bench) -> dict[str, Any]:
    """Do the same with a model of which half the layers have a sliding window, without CUDA graphs.

    A step after a shrink fails if it reads a block that the window has passed and the shrink has released.
    """
    return await _grants(bench, "window", enforce_eager=True)


async def _grants(bench: Bench, size: str = "varied", **changes: Any) -> dict[str, Any]:
    chosen = bench.spec(size, 0.3, **changes)
    async with elastic.fleet({"one": chosen}, bench.device_bytes) as running:
        record = await elastic.under_random_grants(running.engines["one"], 200, 60)
    _require(record["lost"] == 0, "replies were lost", record)
    return record


async def identical(bench: Bench) -> dict[str, Any]:
    """Compare replies token for token under random grants, with vLLM's batch-invariant arithmetic."""
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    try:
        record = await _grants(bench)
    finally:
        del os.environ["VLLM_BATCH_INVARIANT"]
    _require(record["identical"] == record["requests"], "replies changed", record)
    return record


def _require(holds: bool, fault: str, record: dict[str, Any]) -> None:
    """Raise RuntimeError, with a check's record, unless a condition holds."""
    if not holds:
        raise RuntimeError(f"{fault}: {record}")


async def memory(bench: Bench) -> dict[str, Any]:
    """Measure resizes of 1 to 16 GiB: NVML's used memory before and after, and milliseconds.

    Raises RuntimeError if more than a tenth of a size is not returned.
    """
    record: dict[str, Any] = {}
    async with elastic.fleet(
        {"one": bench.spec("0.5b", 0.2 if bench.rehearsal else 0.1)}, bench.device_bytes
    ) as running:
        engine = running.engines["one"]
        limits = engine.limits
        for size in [64 * MIB, GIB] if bench.rehearsal else [GIB, 4 * GIB, 16 * GIB]:
            low = bench.held_bytes()
            grown = await elastic.applied(engine, size)
            high = bench.held_bytes()
            shrunk = await elastic.applied(engine, limits.kv_floor_bytes)
            record[f"{size // MIB} MiB"] = {
                "nvml_grew_mib": (high - low) // MIB,
                "nvml_left_mib": (bench.held_bytes() - low) // MIB,
                "grow_ms": round(grown.seconds * 1000, 2),
                "shrink_ms": round(shrunk.seconds * 1000, 2),
            }
            _require(bench.held_bytes() - low <= size // 10, "memory is not returned", record)
    return record


async def price(bench: Bench) -> dict[str, Any]:
    """Compare throughput and inter-token latency with stock vLLM, in alternating rounds."""
    chosen = bench.spec("0.5b", 0.2, kv_cache_memory_bytes=(64 * MIB if bench.rehearsal else 8 * GIB))
    async with elastic.elastic_and_stock(chosen, bench.device_bytes) as engines:
        return await elastic.price(engines, 1 if bench.rehearsal else 5)


async def trade(bench: Bench) -> dict[str, Any]:
    """Let three engines of different sizes trade memory under load, then kill each."""
    specs = {size: bench.spec(size, share) for size, share in (("0.5b", 0.2), ("1.5b", 0.3), ("7b", 0.45))}
    async with elastic.fleet(specs, bench.device_bytes) as running:
        for engine in running.engines.values():
            assert isinstance(await engine.resize(_slightly_smaller(engine.stats().grant)), Applied)
        traded = await elastic.trade(running, 5 if bench.rehearsal else 30, 40, bench.held_bytes)
        record = {"trade": traded, "kill": await elastic.kill_each(running, 1, 20)}
    _require(not any(part["lost"] for part in (traded, *record["kill"].values())), "replies were lost", record)
    return record


def _slightly_smaller(grant: Grant | None) -> Grant:
    assert grant is not None
    return Grant(grant.gpu_memory_utilization * 0.98, grant.max_active_seqs, grant.max_step_tokens)


CHECKS: dict[str, tuple[Check, int]] = {
    "pages": (pages, 20),
    "start": (start, 60),
    "eager": (eager, 60),
    "graphs": (graphs, 80),
    "window": (window, 60),
    "memory": (memory, 50),
    "price": (price, 120),
    "trade": (trade, 120),
    "identical": (identical, 80),
}
"""The checks, the most important first, and the seconds that each may take."""


async def run(names: list[str], bench: Bench, seconds: float) -> dict[str, Any]:
    """Run the checks that fit into `seconds`. Return each one's record, or why it failed or was skipped."""
    started = time.monotonic()
    record: dict[str, Any] = {}
    for name in names:
        check, needed_s = CHECKS[name]
        check_started = time.monotonic()
        left_s = seconds - (check_started - started)
        if left_s < needed_s:
            record[name] = {"skipped": f"it may take {needed_s} s, but {left_s:.0f} s are left: raise --minutes"}
            continue
        progress(f"--- {name}")
        try:
            async with asyncio.timeout(left_s):
                record[name] = await check(bench)
        except Exception as error:  # noqa: BLE001 (a check may fail in any way, and the next one must still run)
            progress(traceback.format_exc())
            record[name] = {"failed": f"{type(error).__name__}: {error}"}
        record[name]["took_s"] = round(time.monotonic() - check_started, 1)
    return record


def machine() -> dict[str, Any]:
    """Return the hardware, software and commit of the measurements."""
    import torch
    import vllm

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    device = gpu()
    return {
        "gpu": device.name,
        "memory_mib": device.total_bytes // MIB,
        "driver": nvml.devices()[0].driver_version,
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "commit": commit.stdout.strip() or os.environ.get("TROUPE_COMMIT", "unknown"),
        "command": " ".join(sys.argv),
    }


def show(record: dict[str, Any], indent: str = "") -> None:
    """Print a record as an indented table."""
    for name, value in record.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            show(value, indent + "  ")
        else:
            print(f"{indent}{name:<24} {value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"{', '.join(CHECKS)} (default: all, in this order)")
    parser.add_argument("--minutes", type=float, default=8, help="time for all checks (default: 8)")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU with tiny models, and write no record")
    options = parser.parse_args()
    unknown = set(options.checks) - set(CHECKS)
    if unknown:
        parser.error(f"unknown checks: {', '.join(sorted(unknown))}; choose from {', '.join(CHECKS)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not options.rehearse:
        try:
            nvml.devices()
        except (nvml.NoDriver, nvml.DriverFault) as error:
            raise SystemExit(f"cannot use a GPU: {error}; --rehearse runs the same calls on the CPU") from None
    record = asyncio.run(run(options.checks or list(CHECKS), Bench(options.rehearse), options.minutes * 60))
    if not options.rehearse:
        record = {"machine": machine()} | record
        RECORDS.mkdir(exist_ok=True)
        path = RECORDS / f"gpu-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}.json"
        path.write_text(json.dumps(record, indent=2) + "\n")
        progress(f"wrote {path.relative_to(ROOT)}")
    show(record)
    raise SystemExit(1 if any("failed" in value for value in record.values()) else 0)


if __name__ == "__main__":
    main()
