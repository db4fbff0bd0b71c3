"""Benchmark folders for tests."""

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from click.testing import CliRunner, Result

from runtime.bench import results
from runtime.bench.output import Output
from runtime.bench.results import CallRow, JobRow, Moment, Run, Slo, Summary
from runtime.cli.main import cli
from runtime.control.snapshot import EngineMoment

SPEED = {"static": 2.0, "mine": 1.0, "limit": 0.5}


def write_benchmark(
    folder: Path, speed: Mapping[str, float] = SPEED, loads: tuple[float, ...] = (1.0,), **changes: object
) -> Path:
    """Write a benchmark of three repeats. Jobs of a policy take the given seconds times the load, varied by a tenth."""
    rng = random.Random(0)
    runs = []
    with Output(folder, "emulation" in changes) as output:
        for repeat in range(3):
            for load in loads:
                for order, (policy, seconds) in enumerate(speed.items()):
                    jct_s = seconds * load * (1 + repeat / 20)
                    for number in range(30):
                        drawn = jct_s * rng.uniform(0.9, 1.1)
                        call = CallRow("solver", 0.1, drawn / 10, drawn, 0.01, (0.01, 0.02), 5, 10)
                        output.job(
                            JobRow(
                                policy, load, repeat, "a", str(number), 1, drawn, True, None, 0.1, 0.2, None, (call,)
                            )
                        )
                    for tick in range(600):
                        kv = (tick % 100 + 1) << 20
                        engine = EngineMoment(0.3, kv, kv // 2, 3, tick % 40, 64)
                        engines = {"planner": engine, "solver": replace(engine, waiting=5)}
                        for engine_name, restart in (("planner", 5), ("solver", 10)):
                            if tick // 20 == restart:
                                del engines[engine_name]
                        output.moment(
                            Moment(policy, load, repeat, tick / 20, "tick", engines, {"solver": "so"}, 0, 0.01)
                        )
                    figures = {"p95_jct_s": jct_s, "median_jct_s": jct_s / 2, "goodput": 1 / jct_s, "accuracy": 1.0}
                    runs.append(Run(policy, load, repeat, order, {**figures, "p99_jct_s": jct_s * 2, "resizes": 7.0}))
    summary = Summary(
        kind="engines",
        workload="phases",
        config="mine.yaml",
        started="2026-01-01 00:00:00",
        seconds=100,
        command="troupe bench phases",
        machine={"cores": "2"},
        slo=Slo(jct_s=2),
        policies=tuple(speed),
        limit="limit" if "limit" in speed else None,
        loads=loads,
        repeats=3,
        points=results.points(runs),
        runs=tuple(runs),
    )
    results.write(folder, replace(summary, **changes))  # type: ignore[arg-type]  # tests pass fields of Summary
    return folder


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], standalone_mode=False)
