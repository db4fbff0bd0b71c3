"""`troupe simulate`: policies without engines."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from agents.arithmetic import oracle
from runtime import config as configuration
from runtime import logs, run_folder
from runtime.assembly import RunningTeam, start_team
from runtime.bench import workload
from runtime.bench.output import Output
from runtime.bench.output import machine as output_machine
from runtime.bench.results import Run
from runtime.bench.runner import STREAM_INTERVAL, Bench
from runtime.cli import interrupt
from runtime.cli.bench import Plan, finish, options, parse_loads, phase_teams, rivals, summarise, taking_part
from runtime.config import SHIPPED, Config, Control, PolicyChoice
from runtime.control.contained_policy import ContainedPolicies
from runtime.control.decision_log import Record
from runtime.engines.fake import Script
from runtime.engines.request import GenerateRequest
from runtime.errors import ConfigError
from runtime.events import Event
from runtime.jobs import problems
from runtime.jobs.job import Job
from runtime.jobs.team import Team, assemble
from runtime.simulation import agents as paper_agents
from runtime.simulation import fit as fitting
from runtime.simulation import load as model
from runtime.simulation import paper as paper_model
from runtime.simulation import virtual_time
from runtime.simulation.fit import Seen
from runtime.simulation.load import Model
from runtime.simulation.paper import Row

CONSTANTS = SHIPPED / "simulation" / "embedded.yaml"


@click.group()
def simulate() -> None:
    """Policies without engines: the paper's own simulation, and a request-level one on a clock that jumps."""


@simulate.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def paper(as_json: bool) -> None:
    """Print the table of arXiv 2512.22149 from its parameters, beside what it published, and what it is made of."""
    rows = paper_model.table()
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows]))
        return
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("policy", "mean latency", "of it charged", "requests/s", "left in queues", "cost", "published"):
        shown.add_column(column, justify="left" if column in ("policy", "published") else "right", no_wrap=True)
    for row in rows:
        figures = (f"{row.latency_s:.2f} s", f"{row.charged_s:.0f} s", f"{row.requests_per_s:.2f}")
        shown.add_row(row.policy, *figures, f"{row.left_in_queues:.0f}", f"${row.cost:.3f}", row.published)
    Console().print(shown)
    click.echo(_what_it_is_made_of(*rows))


def _what_it_is_made_of(static: Row, turns: Row, adaptive: Row) -> str:
    asked = sum(agent.arrivals / agent.throughput for agent in paper_model.AGENTS)
    return f"""
Algorithm 1 is {1 - adaptive.latency_s / turns.latency_s:.1%} below round-robin. But {turns.charged_s:.0f} of \
round-robin's {turns.latency_s:.1f} s are the {paper_model.NO_SHARE_S:.0f} s
that an agent is charged in every step that is not its turn; without them it is at \
{turns.latency_s - turns.charged_s:.1f} s, below both
others. The agents ask for {asked:.2f} GPUs of one, so every queue grows for ever, whatever the policy.
Against static, Algorithm 1 gains nothing here ({adaptive.latency_s:.1f} to {static.latency_s:.1f} s)."""


@simulate.command()
@click.argument("workload_name", metavar="[WORKLOAD]", default="phases")
@click.option("--config", "-c", default="embedded-scarce", show_default=True, help="A file, or a shipped name.")
@click.option(
    "--constants",
    type=click.Path(path_type=Path),
    default=CONSTANTS,
    help="The engines' constants, as `troupe simulate fit` writes them.",
)
@options
def load(
    workload_name: str,
    config: str,
    constants: Path,
    policies: str,
    loads: str | None,
    repeats: int,
    limit: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Run WORKLOAD over modelled engines under every policy; what is printed and written is as with `troupe bench`.

    The team has to be the embedded one: modelled engines reply as flawless ones would.
    """
    chosen = configuration.load(config)
    source = workload.load(workload_name)
    plan = Plan(chosen, source, rivals(policies), parse_loads(loads, source), repeats, limit, out)
    teams = phase_teams(chosen, source)
    budget_bytes = chosen.device.kv_cache_memory_bytes
    if budget_bytes is None:
        raise ConfigError(f"{chosen.source}: device.kv_cache_memory_bytes: missing; a simulation needs it")
    simulated = Simulated(assemble(chosen), teams, model.read(constants), _oracle, budget_bytes)
    _run(plan, simulated, as_json)


@simulate.command()
@options
def agents(policies: str, loads: str | None, repeats: int, limit: bool, out: Path | None, as_json: bool) -> None:
    """Run the paper's four agents at the level of requests, at loads of 0.3 to 1.5 GPUs' worth."""
    source = paper_agents.AgentsSource()
    plan = Plan(
        configuration.load("embedded"), source, rivals(policies), parse_loads(loads, source), repeats, limit, out
    )
    simulated = Simulated(
        paper_agents.team(),
        paper_agents.teams(),
        paper_agents.model(),
        lambda request: " ".join(["word"] * paper_agents.TOKENS),
        paper_agents.PLACES * paper_agents.PLACE_BYTES,
    )
    _run(plan, simulated, as_json)


@dataclass(frozen=True)
class Simulated:
    """A team over modelled engines: all its seats, the team of every phase, what the engines reply, and the KV cache
    that they share (bytes)."""

    everyone: Team
    teams: Mapping[str, Team]
    model: Model
    script: Script
    budget_bytes: int


def _run(plan: Plan, simulated: Simulated, as_json: bool) -> None:
    started = time.strftime("%Y-%m-%d %H:%M:%S"), time.monotonic()
    with Output(plan.folder) as output:
        runs = virtual_time.run(_simulate(plan, simulated, output))
    finish(plan, summarise(plan, "simulation", started, runs), as_json)


@simulate.command()
@click.option("--config", "-c", default="embedded", show_default=True, help="A file, or a shipped name.")
@click.option(
    "--problems", "count", type=click.IntRange(1), default=60, show_default=True, help="Whose calls are used."
)
@click.option("--out", "-o", type=click.Path(path_type=Path), help="The file to write [default: standard output].")
def fit(config: str, count: int, out: Path | None) -> None:
    """Measure a configuration's engines, and write the constants of their model as YAML."""
    chosen = configuration.load(config)
    asked = problems.read(SHIPPED / "problems" / "held-out.jsonl")[:count]
    found, seen = interrupt.run(_fit(chosen, [Job(p.id, p.problem, p.expected) for p in asked]))
    worst = max(
        abs(found.engines[one.engine].step_s + found.engines[one.engine].token_s * one.sequences - one.step_s)
        / one.step_s
        for one in seen
    )
    machine = " ".join(f"{key} {value}" for key, value in output_machine().items())
    described = found.model_copy(update={"fitted": f"troupe simulate fit --config {config}; {machine}"})
    text = configuration.as_yaml(described)
    if out:
        out.write_text(text, encoding="utf-8")
    else:
        click.echo(text, nl=False)
    click.echo(f"lanes {found.lanes:.2f}; a step's time is at most {worst:.0%} from what was measured", err=True)


async def _fit(config: Config, jobs: list[Job]) -> tuple[Model, list[Seen]]:
    folder = run_folder.create()
    logs.log_to(folder)
    team = assemble(config)
    quiet = config.model_copy(update={"control": Control(policy=PolicyChoice(name="static"))})

    def progress(text: str) -> None:
        click.echo(f"\r\033[K{text}", nl=False, err=True)

    progress("starting the engines")
    async with start_team(quiet, team, folder) as running:
        found = await fitting.fit(team, running.engines, jobs, progress)
    click.echo("\r\033[K", nl=False, err=True)
    return found


async def _simulate(plan: Plan, simulated: Simulated, output: Output) -> list[Run]:
    control = plan.config.control
    benches: list[Bench] = []
    left = iter(range(plan.runs - 1, 0, -1))

    def progress(name: str) -> None:
        click.echo(f"\r\033[K{name} ({next(left)} to go)", nl=False, err=True)

    def hear(event: Event) -> None:
        for bench in benches:
            bench.hear(event)

    def publish(record: Record) -> None:
        for bench in benches:
            bench.publish(record)

    scripts = dict.fromkeys(simulated.model.engines, simulated.script)
    async with model.engines(simulated.model, scripts, simulated.budget_bytes) as (engines, sharing):
        policies = ContainedPolicies(control.policy, control.shadow, threads=False)
        running = RunningTeam(simulated.everyone, engines, sharing, control, policies, listener=hear, publish=publish)
        orchestrators = {
            phase: running.orchestrate(members, STREAM_INTERVAL) for phase, members in simulated.teams.items()
        }
        bench = Bench(
            running,
            orchestrators,
            plan.source,
            policies.contain,
            simulated.budget_bytes,
            output.job,
            output.moment,
            progress,
        )
        benches.append(bench)
        device_bytes = min(engine.limits.device_bytes for engine in engines.values())
        async with running.controller:
            runs = await bench.run(taking_part(plan, device_bytes), plan.loads, plan.repeats, warm_up=False)
    click.echo("\r\033[K", nl=False, err=True)
    return runs


def _oracle(request: GenerateRequest) -> str:
    """What a flawless model of the embedded team would reply."""
    return oracle.reply(request.messages[-1].content)
