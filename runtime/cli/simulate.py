"""`troupe simulate`: run policies over modelled engines, and print the simulation of the paper."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from runtime import config as configuration
from runtime import logs, run_folder
from runtime.assembly import RunningTeam, start_team
from runtime.bench import workload
from runtime.bench.output import Output
from runtime.bench.output import machine as output_machine
from runtime.bench.plan import Plan, parse_loads, phase_teams, residency_rivals, rivals, summarise, taking_part
from runtime.bench.results import Run
from runtime.bench.runner import STREAM_INTERVAL, Bench, Recorder
from runtime.bench.workload import Lengths
from runtime.cli import interrupt
from runtime.cli.bench import finish, options
from runtime.cli.config_option import config_option
from runtime.config import SHIPPED, Config, Control, PolicyChoice
from runtime.control.contained_policy import ContainedPolicies
from runtime.engines.fake import Script
from runtime.errors import ConfigError, InputError
from runtime.jobs import problems
from runtime.jobs.job import Job
from runtime.jobs.team import Team, assemble
from runtime.simulation import agents as paper_agents
from runtime.simulation import fit as fitting
from runtime.simulation import load as model
from runtime.simulation import paper as paper_model
from runtime.simulation import roofline as rooflines
from runtime.simulation import virtual_time
from runtime.simulation.assembly import MODEL as CONSTANTS
from runtime.simulation.calls import calls_per_s, reply
from runtime.simulation.fit import Measurement
from runtime.simulation.lengths import drawn
from runtime.simulation.load import Model
from runtime.simulation.paper import Row
from runtime.simulation.roofline import REGIMES, SharingMode


@click.group()
def simulate() -> None:
    """Simulate policies without real engines, in virtual time, and reproduce the table of arXiv 2512.22149."""


@simulate.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def paper(as_json: bool) -> None:
    """Reproduce the table of arXiv 2512.22149 from its parameters, beside the published figures, and explain it."""
    rows = paper_model.table()
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows]))
        return
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("policy", "latency", "charged", "requests/s", "queued", "cost", "published"):
        is_text = column in ("policy", "published")
        shown.add_column(column, justify="left" if is_text else "right", no_wrap=column != "published")
    for row in rows:
        figures = (f"{row.latency_s:.2f} s", f"{row.charged_s:.0f} s", f"{row.requests_per_s:.2f}")
        shown.add_row(row.policy, *figures, f"{row.left_in_queues:.0f}", f"${row.cost:.3f}", row.published)
    Console().print(shown)
    click.echo(_explanation(*rows))


def _explanation(static: Row, round_robin: Row, adaptive: Row) -> str:
    gpus = sum(agent.arrivals / agent.throughput for agent in paper_model.AGENTS)
    without_charge_s = round_robin.latency_s - round_robin.charged_s
    return f"""
Algorithm 1 is {1 - adaptive.latency_s / round_robin.latency_s:.1%} below round-robin, as published.
But {round_robin.charged_s:.0f} s of round-robin's mean come from the {paper_model.NO_SHARE_S:.0f} s that an agent
is charged in each step that is not its turn. Without the charge,
round-robin is at {without_charge_s:.1f} s, below both others.
The agents need {gpus:.2f} GPUs and have one, so every queue grows without bound
under any policy. Algorithm 1 is no better than static here."""


@simulate.command()
@click.argument("workload_name", metavar="[WORKLOAD]", default="phases")
@config_option("embedded-scarce")
@click.option(
    "--constants",
    default=CONSTANTS,
    show_default=True,
    help="A file of the engines' constants, from `troupe simulate fit` or `roofline`, or the name of a shipped one.",
)
@click.option(
    "--devices",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    help="Number of devices, each with the memory of the constants and a replica of every engine.",
)
@options
def load(
    workload_name: str,
    config: str,
    constants: str,
    devices: int,
    policies: str,
    residency: str | None,
    loads: str | None,
    repeats: int,
    limit: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Run WORKLOAD over modelled engines under each policy, and print and write the same as `troupe bench`.

    The modelled engines reply correctly to the embedded team. To other roles they give replies that fit the role's
    schema, at once or after lengths that WORKLOAD draws; they call no tools.
    """
    chosen = configuration.load(config)
    engines = model.read(constants)
    source = workload.load(workload_name)
    source = source.at_rate(engines.rate_factors.get(source.name, 1))
    lengths = source.workload.lengths
    if unknown := lengths.keys() - engines.engines.keys():
        raise ConfigError(
            f"workload {source.name}: lengths.{min(unknown)}: there is no such engine; "
            f"the engines of {constants} are {', '.join(engines.engines)}"
        )
    if residency and not engines.device_bytes:
        raise ConfigError(f"--residency: the engines of {constants} cannot sleep; use constants with device_bytes")
    chosen_rivals = residency_rivals(residency, chosen) if residency else rivals(policies)
    plan = Plan(chosen, source, chosen_rivals, parse_loads(loads, source), repeats, limit, out)
    teams = {phase: team.without_tools() for phase, team in phase_teams(chosen, source).items()}
    budget_bytes = engines.device_bytes or engines.kv_cache_bytes or chosen.device.kv_cache_memory_bytes
    if budget_bytes is None:
        raise ConfigError(
            f"{chosen.source}: device.kv_cache_memory_bytes: this key is required for a simulation; "
            "give the KV cache of all engines together, such as 18MiB"
        )
    simulated = Simulated(assemble(chosen).without_tools(), teams, engines, reply, budget_bytes, lengths, devices)
    _run(plan, simulated, as_json)


@simulate.command()
@options
def agents(
    policies: str,
    residency: str | None,
    loads: str | None,
    repeats: int,
    limit: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Simulate the paper's four agents request by request, at loads of 0.3 to 1.5 GPUs."""
    if residency:
        raise ConfigError("--residency: the paper's agents never sleep")
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
    """A team over modelled engines.

    `whole_team` has all seats, and `teams` has the team of each phase. `script` gives the engines' replies. The engines
    share `budget_bytes` of KV cache on each of the `devices`. `lengths` gives the lengths of the calls of some engines.
    """

    whole_team: Team
    teams: Mapping[str, Team]
    model: Model
    script: Script
    budget_bytes: int
    lengths: Mapping[str, Lengths] = field(default_factory=dict)
    devices: int = 1


def _run(plan: Plan, simulated: Simulated, as_json: bool) -> None:
    started = time.strftime("%Y-%m-%d %H:%M:%S"), time.monotonic()
    with Output(plan.folder) as output:
        runs = virtual_time.run(run_simulated(plan, simulated, output))
    finish(plan, summarise(plan, "simulation", started, runs), as_json)


@simulate.command()
@config_option("embedded")
@click.option(
    "--problems",
    "count",
    type=click.IntRange(1),
    default=60,
    show_default=True,
    help="Number of problems whose calls are recorded.",
)
@click.option("--out", "-o", type=click.Path(path_type=Path), help="File to write. [default: standard output]")
def fit(config: str, count: int, out: Path | None) -> None:
    """Measure the engines of a configuration, and write the constants of their model as YAML."""
    if out and (out.is_dir() or not out.parent.is_dir()):
        raise InputError(f"--out: {out} is not a file in a folder that exists")
    chosen = configuration.load(config)
    asked = problems.read(SHIPPED / "problems" / "held-out.jsonl")[:count]
    fitted, measurements = interrupt.run(
        _fit(chosen, [Job(p.id, p.problem, p.expected, compare=p.compare) for p in asked])
    )
    worst = max(abs(fitted.engines[m.engine].decode_step_s(m.sequences) - m.step_s) / m.step_s for m in measurements)
    machine = " ".join(f"{key} {value}" for key, value in output_machine().items())
    _write(fitted.model_copy(update={"fitted": f"troupe simulate fit --config {config}; {machine}"}), out)
    click.echo(
        f"lanes {fitted.lanes:.2f}; the modelled time of a step differs by at most {worst:.0%} from the measured one",
        err=True,
    )


@simulate.command()
@click.argument("gpu", type=click.Choice(list(REGIMES)))
@click.argument("workload_name", metavar="[WORKLOAD]", default="realistic")
@config_option("embedded")
@click.option(
    "--sharing",
    type=click.Choice([mode.value for mode in SharingMode]),
    default=SharingMode.TIME_SLICING.value,
    show_default=True,
    help="The way in which engines share the GPU: in turns, or with overlapping kernels.",
)
@click.option("--out", "-o", type=click.Path(path_type=Path), help="File to write. [default: standard output]")
def roofline(gpu: str, workload_name: str, config: str, sharing: str, out: Path | None) -> None:
    """Derive the constants of engines on a GPU for WORKLOAD from published figures, and write them as YAML.

    Nothing is measured, and no GPU is needed. WORKLOAD must have lengths for every engine of the configuration. If any
    engine of the configuration may sleep, all derived engines do.
    """
    chosen, source, regime = configuration.load(config), workload.load(workload_name), REGIMES[gpu]
    lengths = source.workload.lengths
    if missing := [name for name in chosen.engines if name not in lengths]:
        raise ConfigError(
            f"workload {source.name}: lengths.{missing[0]}: this key is required to derive constants; "
            "give the lengths of prompts and replies, such as {prompt: [300, 1500], reply: [100, 400]}"
        )
    if source.trace:
        raise ConfigError(f"workload {source.name}: trace: give phases instead; a trace has no rate to scale")
    phases = {phase: team.without_tools() for phase, team in phase_teams(chosen, source).items()}
    calls = virtual_time.run(calls_per_s(source, phases))
    lengths = {name: lengths[name] for name in chosen.engines}
    sleeping = any(map(chosen.may_sleep, chosen.engines))
    derived = rooflines.derive(regime, source.name, lengths, calls, SharingMode(sharing), sleeping)
    of = f"{workload_name} --config {config}" if sleeping else workload_name
    command = f"troupe simulate roofline {gpu} {of} --sharing {sharing}"
    _write(derived.model_copy(update={"fitted": f"{command}; derived, not measured"}), out)


def _write(constants: Model, out: Path | None) -> None:
    """Write constants to a file, or to standard output. Raises InputError, and prints them, if the file cannot be."""
    text = configuration.as_yaml(constants)
    if out is None:
        click.echo(text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        click.echo(text, nl=False)
        raise InputError(f"--out: {out} cannot be written: {error.strerror}") from None


async def _fit(config: Config, jobs: list[Job]) -> tuple[Model, list[Measurement]]:
    folder = run_folder.create()
    logs.log_to(folder)
    team = assemble(config)
    static = config.model_copy(update={"control": Control(policy=PolicyChoice(name="static"))})

    def progress(text: str) -> None:
        click.echo(f"\r\033[K{text}", nl=False, err=True)

    progress("starting the engines")
    async with start_team(static, team, folder) as running:
        fitted = await fitting.fit(team, running.engines, jobs, progress)
    click.echo("\r\033[K", nl=False, err=True)
    return fitted


async def run_simulated(plan: Plan, simulated: Simulated, output: Output) -> list[Run]:
    """Run a plan over modelled engines, on a clock that jumps."""
    control = plan.config.control
    runs_to_go = iter(range(plan.runs - 1, 0, -1))

    def progress(name: str) -> None:
        click.echo(f"\r\033[K{name} ({next(runs_to_go)} to go)", nl=False, err=True)

    recorder = Recorder(output.moment)
    scripts = dict.fromkeys(simulated.model.engines, simulated.script)
    lengths = {name: drawn(of_engine) for name, of_engine in simulated.lengths.items()}
    async with model.devices(
        simulated.model, scripts, simulated.budget_bytes, simulated.devices, lengths=lengths
    ) as started:
        policies = ContainedPolicies(control.policy, control.shadow, threads=False)
        running = RunningTeam(
            simulated.whole_team,
            started,
            control,
            policies,
            listener=recorder.on_event,
            publish=recorder.publish,
            may_sleep=tuple(simulated.model.engines) if simulated.model.device_bytes else (),
        )
        orchestrators = {
            phase: running.orchestrate(members, STREAM_INTERVAL) for phase, members in simulated.teams.items()
        }
        bench = Bench(
            running,
            recorder,
            orchestrators,
            plan.source,
            policies.contain,
            dict.fromkeys(started, simulated.budget_bytes),
            on_job=output.job,
            on_run=progress,
        )
        device_bytes = min(engine.limits.device_bytes for engine in running.engines.values())
        async with running:
            runs = await bench.run(taking_part(plan, device_bytes), plan.loads, plan.repeats, warm_up=False)
    click.echo("\r\033[K", nl=False, err=True)
    return runs
