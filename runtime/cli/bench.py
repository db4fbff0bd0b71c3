"""`troupe bench`: policies side by side on real engines."""

import asyncio
import json
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from runtime import config as configuration
from runtime import logs, run_folder
from runtime.assembly import start_team
from runtime.bench import results, workload
from runtime.bench.output import Output, command, default_folder, machine
from runtime.bench.results import Summary
from runtime.bench.runner import LIMIT, SETTLE_S, STREAM_INTERVAL, Bench, Rival
from runtime.bench.table import table
from runtime.bench.workload import Source
from runtime.cli import interrupt
from runtime.config import Config, PolicyChoice
from runtime.control import catalogue
from runtime.control.contained_policy import ContainedPolicies
from runtime.control.decision_log import Record
from runtime.errors import ConfigError, InputError
from runtime.events import EngineChanged, Event
from runtime.jobs.team import Team, assemble

POLICIES = "static,round_robin,paper,modelclaim,on_demand,waterfill"


class _RunByDefault(click.Group):
    """A group whose first word may be left out: `troupe bench phases` is `troupe bench run phases`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ("-h", "--help")):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_RunByDefault)
def bench() -> None:
    """Run a workload under several allocation policies in turn, and write figures, plots and a report.

    \b
    troupe bench phases                        the shipped phase-shifting workload, on the embedded team
    troupe bench my.yaml --policies static,waterfill --repeats 5 --out results
    troupe bench compare results-a results-b
    """


def options(command: click.decorators.FC) -> click.decorators.FC:
    """What benchmarks and simulations have in common."""
    for option in (
        click.option("--policies", "-p", default=POLICIES, show_default=True, help="Names, separated by commas."),
        click.option("--loads", help="Multiples of the workload's rate, separated by commas."),
        click.option("--repeats", type=click.IntRange(1), default=3, show_default=True),
        click.option("--limit/--no-limit", default=True, help="Also with memory for everyone: what is possible."),
        click.option("--out", "-o", type=click.Path(path_type=Path), help="The folder for results."),
        click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON."),
    ):
        command = option(command)
    return command


@bench.command()
@click.argument("workload_name", metavar="[WORKLOAD]", default="phases")
@click.option("--config", "-c", default="embedded-scarce", show_default=True, help="A file, or a shipped name.")
@options
def run(
    workload_name: str,
    config: str,
    policies: str,
    loads: str | None,
    repeats: int,
    limit: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Run WORKLOAD (a file, or a shipped name) on real engines under every policy in turn."""
    chosen = configuration.load(config)
    source = workload.load(workload_name)
    plan = Plan(chosen, source, rivals(policies), parse_loads(loads, source), repeats, limit, out)
    teams = phase_teams(chosen, source)
    summary = interrupt.run(_bench(plan, teams))
    finish(plan, summary, as_json)


@bench.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--all", "everything", is_flag=True, help="Every metric, not the main ones alone.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def compare(a: Path, b: Path, everything: bool, as_json: bool) -> None:
    """Hold the results in folder B against those in folder A: ratios, and what is more than noise."""
    from runtime.bench import compare as comparing

    found = comparing.compare(a, b)
    if as_json:
        click.echo(json.dumps(asdict(found)))
        return
    for warning in found.warnings:
        click.echo(f"note: {warning}", err=True)
    Console().print(comparing.table(found, everything))


@dataclass(frozen=True)
class Plan:
    """What is to be run, and where the results go."""

    config: Config
    source: Source
    rivals: list[PolicyChoice]
    loads: tuple[float, ...]
    repeats: int
    limit: bool
    out: Path | None
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", self.out or default_folder(self.source.name))

    @property
    def runs(self) -> int:
        """How many plays of the workload, the warm-up among them."""
        return (len(self.rivals) + self.limit) * len(self.loads) * self.repeats + 1


def rivals(policies: str) -> list[PolicyChoice]:
    """The policies of an option. Raises ConfigError for one that there is not."""
    found = [PolicyChoice(name=name.strip()) for name in policies.split(",") if name.strip()]
    if not found or len({choice.name for choice in found}) < len(found):
        raise ConfigError("--policies: give at least one, and none twice")
    for choice in found:
        catalogue.make(choice.name, place="--policies")
    return found


def parse_loads(text: str | None, source: Source) -> tuple[float, ...]:
    """The loads of an option, by default the workload's own. Raises InputError."""
    if text is None:
        return source.workload.loads
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < load <= 1000 for load in found) or len(set(found)) < len(found):
        raise InputError(f"--loads: numbers above 0, separated by commas, none twice; not {text!r}")
    return found


def phase_teams(config: Config, source: Source) -> dict[str, Team]:
    """The team of every phase: the configuration's with what the phase says of its workflow. Raises ConfigError."""
    if source.trace:
        return {"trace": assemble(config)}
    teams = {}
    for phase in source.workload.phases:
        name = phase.workflow.get("name", config.workflow.name)
        base = dict(config.workflow.options) if name == config.workflow.name else {}
        changed = type(config.workflow).model_validate({**base, **phase.workflow, "name": name})
        try:
            teams[phase.name] = assemble(config.model_copy(update={"workflow": changed}))
        except ConfigError as error:
            raise ConfigError(f"workload {source.name}: phases.{phase.name}.workflow: {error}") from None
        for problem in source.problems:
            teams[phase.name].check(problem.problem)
    return teams


async def _bench(plan: Plan, teams: Mapping[str, Team]) -> Summary:
    folder = run_folder.create()
    logs.log_to(folder)
    config = plan.config
    everyone = assemble(config)
    benches: list[Bench] = []

    def hear(event: Event) -> None:
        if isinstance(event, EngineChanged) and not benches:
            bar.describe(f"{event.engine} {event.state}")
        for bench in benches:
            bench.hear(event)

    def publish(record: Record) -> None:
        for bench in benches:
            bench.publish(record)

    started = time.strftime("%Y-%m-%d %H:%M:%S"), time.monotonic()
    async with AsyncExitStack() as owned:
        output = owned.enter_context(Output(plan.folder))
        bar = await owned.enter_async_context(Bar(plan))
        running = await owned.enter_async_context(start_team(config, everyone, folder, hear, publish))
        ledger = running.sharing.ledger
        device_bytes = min(engine.limits.device_bytes for engine in running.engines.values())
        policies = owned.enter_context(ContainedPolicies(config.control.policy, config.control.shadow))
        bench = Bench(
            running,
            {phase: running.orchestrate(team, STREAM_INTERVAL) for phase, team in teams.items()},
            plan.source,
            policies.contain,
            ledger.budget_bytes,
            output.job,
            output.moment,
            bar.next,
        )
        benches.append(bench)
        runs = await bench.run(taking_part(plan, device_bytes), plan.loads, plan.repeats)
        bar.describe("closing the engines")
    return summarise(plan, "engines", started, runs)


def taking_part(plan: Plan, device_bytes: int) -> list[Rival]:
    """The policies, and memory for everyone."""
    limit = [Rival(LIMIT, PolicyChoice(name="static"), device_bytes)] if plan.limit else []
    return [Rival(choice.name, choice) for choice in plan.rivals] + limit


def summarise(plan: Plan, kind: str, started: tuple[str, float], runs: list[results.Run]) -> Summary:
    """The summary of all runs, written to the folder."""
    summary = Summary(
        kind=kind,
        workload=plan.source.name,
        config=plan.config.source.name,
        started=started[0],
        seconds=round(time.monotonic() - started[1], 1),
        command=command(),
        machine=machine(),
        slo=plan.source.workload.limits,
        policies=tuple(dict.fromkeys(run.policy for run in runs)),
        limit=LIMIT if plan.limit else None,
        loads=plan.loads,
        repeats=plan.repeats,
        points=results.points(runs),
        runs=tuple(runs),
        stream_interval=STREAM_INTERVAL,
    )
    results.write(plan.folder, summary)
    return summary


def finish(plan: Plan, summary: Summary, as_json: bool) -> None:
    """Draw, write the report, and say where it is."""
    from runtime.bench import report  # draws: matplotlib takes a second to import

    written = report.write(plan.folder)
    if as_json:
        click.echo((plan.folder / results.SUMMARY).read_text(encoding="utf-8").strip())
        return
    Console().print(table(summary))
    click.echo(f"{written}")


class Bar:
    """Progress with the time that is left: an async context manager."""

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

    def next(self, name: str) -> None:
        """A run begins."""
        self._run += 1
        self._began_s = time.monotonic()
        self.describe(name)

    def describe(self, text: str) -> None:
        """Say what goes on."""
        self._bar.update(self._task, description=text)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            if self._run:
                within = min(time.monotonic() - self._began_s, self._each_s)
                self._bar.update(self._task, completed=(self._run - 1) * self._each_s + within)
