"""What deciding costs: the controller's figures of the README.

    python scripts/measure_control.py tick    microseconds of a decision for 3 to 10,000 roles, for every policy

Each policy decides on the same drawn snapshots, in turns: once where the decision changes every grant, once where it
finds them as it wants them. The slope is fitted through the logarithms: 1 is linear. --json prints the record.
"""

import argparse
import gc
import json
import math
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime.control import catalogue  # noqa: E402  (the repository, installed or not)
from runtime.control.policy import Policy  # noqa: E402
from runtime.control.snapshot import EngineView, Snapshot  # noqa: E402
from runtime.engines.base import EngineLimits, Grant  # noqa: E402

ROLES = (3, 10, 100, 1_000, 10_000)
MIB = 1 << 20
LIMITS = EngineLimits(1 << 50, 1 << 30, MIB, 1 << 40, 64, 1, 2048, block_bytes=MIB // 2, block_tokens=128)


def measure_tick(repeats: int) -> dict[str, Any]:
    """Microseconds of `Policy.decide`, medians of repeats, and the slope over the number of roles."""
    policies = {name: catalogue.make(name) for name in catalogue.names()}
    record: dict[str, Any] = {}
    for kind in ("all change", "none changes"):
        figures: dict[str, dict[str, float]] = {name: {} for name in policies}
        for roles in ROLES:
            times: dict[str, list[float]] = {name: [] for name in policies}
            drawn = draw(roles)
            given = {name: settled(policy, drawn) if kind[0] == "n" else drawn for name, policy in policies.items()}
            for _ in range(max(repeats, 2000 // roles)):
                for name, policy in policies.items():
                    times[name].append(seconds(policy, given[name]))
            for name in policies:
                figures[name][str(roles)] = round(statistics.median(times[name]) * 1e6, 1)
            print(f"{kind}, {roles} roles", file=sys.stderr, flush=True)
        record[kind] = {name: {**found, "slope": slope(found)} for name, found in figures.items()}
    return record


def seconds(policy: Policy, snapshot: Snapshot) -> float:
    fresh = replace(snapshot)  # what a snapshot works out once, it works out again
    gc.disable()
    started = time.perf_counter()
    policy.decide(fresh)
    took = time.perf_counter() - started
    gc.enable()
    return took


def draw(roles: int) -> Snapshot:
    """Engines in any state, and less memory than they could use."""
    rng = random.Random(roles)
    views = {}
    for number in range(roles):
        kv = rng.randint(2, 20) * MIB
        views[f"role-{number}"] = EngineView(
            f"role-{number}",
            LIMITS,
            Grant(LIMITS.share(kv), 64, 2048),
            kv,
            kv // 2,
            in_flight=(in_flight := rng.randint(0, 40)),
            peak_in_flight=in_flight + rng.random(),
            running=rng.randint(0, 10),
            soon=rng.random() * 5,
            coming=rng.random() * 20,
            arrivals_per_s=rng.random() * 30,
            completions_per_s=rng.random() * 30,
            sequence_bytes=MIB / 2,
            oldest_wait_s=rng.random(),
            minimum_share=1 / roles,
        )
    return Snapshot(5.0, roles * (LIMITS.fixed_bytes + 6 * MIB), views)


def settled(policy: Policy, snapshot: Snapshot) -> Snapshot:
    """The same with every engine at what the policy gives it."""
    grants = policy.decide(snapshot).grants
    views = {
        name: replace(
            view, grant=grants[name], kv_cache_bytes=LIMITS.kv_cache_bytes(grants[name].gpu_memory_utilization)
        )
        for name, view in snapshot.engines.items()
    }
    return replace(snapshot, engines=views)


def slope(found: dict[str, float]) -> float:
    """Of the logarithm of time over that of roles, from 10 roles on."""
    points = [(math.log(int(roles)), math.log(value)) for roles, value in found.items() if int(roles) >= 10]
    return round(statistics.linear_regression(*zip(*points, strict=True)).slope, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tick"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print the record as one line of JSON")
    options = parser.parse_args()
    record = measure_tick(options.repeats)
    print(json.dumps(record) if options.json else json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
