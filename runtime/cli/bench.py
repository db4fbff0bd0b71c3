"""`troupe bench`: run a workload under several policies on real engines, and compare two results."""

import asyncio
import json
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from runtime import config as configuration
from runtime import logs, run_folder
from runtime.assembly import start_team
from runtime.bench import results, workload
from runtime.bench.output import Output
from runtime.bench.plan import (
    Plan,
    parse_loads,
    parse_step_times,
    phase_teams,
    residency_rivals,
    rivals,
    summarise,
    taking_part,
)
from runtime.bench.results import Summary
from runtime.bench.runner import SETTLE_S, STREAM_INTERVAL, Bench, Recorder
from runtime.bench.table import table
from runtime.cli import interrupt
from runtime.cli.config_option import config_option
from runtime.cli.solve_screen import waiting_line
from runtime.control.contained_policy import ContainedPolicies
from runtime.errors import ConfigError
from runtime.events import EngineChanged, Event, NodesAwaited, fan_out
from runtime.jobs.team import Team, assemble

POLICIES = "static,round_robin,paper,modelclaim,on_demand,waterfill,turns"


class _RunByDefault(click.Group):
    """A group whose default command is `run`: `troupe bench phases` is `troupe bench run phases`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ("-h", "--help")):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_RunByDefault)
def bench() -> None:
    """Run a workload under several memory policies in turn, and write metrics, plots and a report.

    \b
    troupe bench phases                        a shipped workload on the embedded team
    troupe bench my.yaml --policies static,waterfill --repeats 5 --out results
    troupe bench compare results-a results-b
    """


def options(command: click.decorators.FC) -> click.decorators.FC:
    """Add the options that `troupe bench` and `troupe simulate` share."""
    for option in (
        click.option(
            "--policies", "-p", default=POLICIES, show_default=True, help="Policies to run, separated by commas."
        ),
        click.option(
            "--residency",
            metavar="NAMES",
            help="Residency policies to run instead of `--policies`, separated by commas, such as `job_graph,lru`. "
            "[default: none]",
        ),
        click.option(
            "--loads", help="Multiples of the workload's rates, separated by commas. [default: the workload's own]"
        ),
        click.option(
            "--repeats",
            type=click.IntRange(1),
            default=3,
            show_default=True,
            help="The number of runs of each policy at each load.",
        ),
        click.option(
            "--limit/--no-limit",
            default=True,
            show_default=True,
            help="Also run with memory for all engines, to show what is possible.",
        ),
        click.option(
            "--out",
            "-o",
            type=click.Path(path_type=Path),
            help="Folder for the results. [default: a new one in the current folder]",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON."),
    ):
        command = option(command)
    return command


@bench.command()
@click.argument("workload_name", metavar="[WORKLOAD]", default="phases")
@config_option("embedded-scarce")
@click.option(
    "--emulate",
    metavar="TIMES",
    help="Emulate a device on which engines on the CPU take turns, such as `planner=8,solver=20+0.1,critic=12`: a step "
    "of each engine takes at least these milliseconds, and 0.1 ms more for each sequence. [default: no emulation]",
)
@options
def run(
    workload_name: str,
    config: str,
    emulate: str | None,
    policies: str,
    residency: str | None,
    loads: str | None,
    repeats: int,
    limit: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Run WORKLOAD, a file or a shipped name, on real engines under each policy in turn."""
    chosen = configuration.load(config)
    source = workload.load(workload_name)
    if source.workload.lengths:
        raise ConfigError(
            f"workload {source.name}: lengths: real engines have the lengths of their own prompts and replies; "
            "use `troupe simulate load`, or remove this key"
        )
    step_times = parse_step_times(emulate, chosen)
    chosen_rivals = residency_rivals(residency, chosen) if residency else rivals(policies)
    plan = Plan(chosen, source, chosen_rivals, parse_loads(loads, source), repeats, limit, out, step_times)
    teams = phase_teams(chosen, source)
    summary = interrupt.run(_bench(plan, teams))
    finish(plan, summary, as_json)


@bench.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--all", "everything", is_flag=True, help="Show every metric, not only the main ones.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(a: Path, b: Path, everything: bool, as_json: bool) -> None:
    """Compare the results in folder B with those in folder A: ratios of medians, and which exceed the noise."""
    from runtime.bench import compare as comparing

    comparison = comparing.compare(a, b)
    if as_json:
        click.echo(json.dumps(asdict(comparison)))
        return
    for warning in comparison.warnings:
        click.echo(f"note: {warning}", err=True)
    Console().print(comparing.table(comparison, everything))


async def _bench(plan: Plan, teams: Mapping[str, Team]) -> Summary:
    folder = run_folder.create()
    logs.log_to(folder)
    config = plan.config
    whole_team = assemble(config).with_seats_of(teams.values())

    def show_start(event: Event) -> None:
        if isinstance(event, EngineChanged) and not bar.has_runs:
            bar.describe(f"{event.engine} {event.state}")
        elif isinstance(event, NodesAwaited):
            bar.describe(waiting_line(event))

    started = time.strftime("%Y-%m-%d %H:%M:%S"), time.monotonic()
    async with AsyncExitStack() as owned:
        output = owned.enter_context(Output(plan.folder, plan.emulation is not None))
        bar = await owned.enter_async_context(Bar(plan))
        recorder = Recorder(output.moment)
        listener = fan_out(show_start, recorder.on_event)
        running = await owned.enter_async_context(
            start_team(config, whole_team, folder, listener, recorder.publish, plan.step_times)
        )
        device_bytes = min(engine.limits.device_bytes for engine in running.engines.values())
        if plan.rivals[0].residency:  # a larger device, for all engines at once
            device_bytes = sum(e.limits.fixed_bytes + e.limits.kv_ceiling_bytes for e in running.engines.values())
        policies = owned.enter_context(ContainedPolicies(config.control.policy, config.control.shadow))
        bench = Bench(
            running,
            recorder,
            {phase: running.orchestrate(team, STREAM_INTERVAL) for phase, team in teams.items()},
            plan.source,
            policies.contain,
            {name: device.sharing.ledger.budget_bytes for name, device in running.devices.items()},
            on_job=output.job,
            on_run=bar.next,
        )
        runs = await bench.run(taking_part(plan, device_bytes), plan.loads, plan.repeats)
        bar.describe("closing the engines")
    return summarise(plan, "engines", started, runs)


def finish(plan: Plan, summary: Summary, as_json: bool) -> None:
    """Draw the plots, write the report, and print the summary and the report's path."""
    from runtime.bench import report  # matplotlib takes a second to import

    report_path = report.write(plan.folder)
    if as_json:
        click.echo((plan.folder / results.SUMMARY).read_text(encoding="utf-8").strip())
        return
    Console().print(table(summary))
    click.echo(f"{report_path}")


class Bar:
    """A progress bar with the remaining time. An async context manager."""

    def __init__(self, plan: Plan) -> None:
        self._each_s = max(plan.source.workload.seconds, 1.0) + SETTLE_S
        self._run = 0
        self._began_s = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=Console(stderr=True)
        )
        self._task = self._bar.add_task("starting", total=plan.runs * self._each_s)

    async def __aenter__(self) -> "Bar":
        self._bar.start()
        self._ticking = asyncio.create_task(self._tick(), name="progress")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._ticking.cancel()
        with suppress(asyncio.CancelledError):
            await self._ticking
        self._bar.stop()

    @property
    def has_runs(self) -> bool:
        """Return True once the first run has started."""
        return self._run > 0

    def next(self, name: str) -> None:
        """Start the next run."""
        self._run += 1
        self._began_s = time.monotonic()
        self.describe(name)

    def describe(self, text: str) -> None:
        """Show a description beside the bar."""
        self._bar.update(self._task, description=text)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            if self._run:
                within = min(time.monotonic() - self._began_s, self._each_s)
                self._bar.update(self._task, completed=(self._run - 1) * self._each_s + within)
