"""`troupe solve`: works one problem, or a file of problems, and exits."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.spinner import Spinner

from runtime import config as configuration
from runtime import logs, run_folder
from runtime.assembly import RunningTeam, start_team
from runtime.cli import interrupt, solve_screen, watch
from runtime.cli.config_option import config_option
from runtime.cli.results_file import read_kept
from runtime.cli.solve_report import Report
from runtime.config import Config
from runtime.errors import InputError, PluginError
from runtime.events import EngineChanged, Event, NodesAwaited, RoleReplied, ToolCalled, ToolReturned, fan_out
from runtime.jobs import problems
from runtime.jobs.batch import work_all
from runtime.jobs.comparison import Comparison
from runtime.jobs.job import Job, JobResult
from runtime.jobs.problems import Problem
from runtime.jobs.team import Team, assemble
from runtime.jobs.tool_record import tool_entry
from runtime.tracing.traced import traced


@dataclass(frozen=True)
class Options:
    """The options of a run. `temperature` and `seed` apply to every role."""

    out: Path | None
    resume: bool
    concurrency: int
    temperature: float | None
    seed: int
    watching: bool
    as_json: bool

    def job(self, problem: Problem) -> Job:
        """Return the job that works a problem."""
        return Job(problem.id, problem.problem, problem.expected, self.temperature, self.seed, compare=problem.compare)


@click.command()
@click.argument("problem", required=False)
@click.option(
    "--file",
    "-f",
    type=click.Path(path_type=Path),
    help='Solve the problems in this file: a JSON object a line, {"id", "problem", "answer", "compare"}.',
)
@click.option(
    "--compare",
    type=click.Choice([str(comparison) for comparison in Comparison]),
    help="Compare answers in this way if a problem names none. By default, expected numbers are compared as numbers, "
    "and other answers as text.",
)
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Write the results here, a JSON object a line.")
@click.option("--resume", is_flag=True, help="Keep the answers in --out; solve the other problems, failed ones too.")
@click.option(
    "--concurrency", type=click.IntRange(1), default=32, show_default=True, help="Work this many problems at once."
)
@config_option()
@click.option(
    "--workflow",
    "-w",
    help="Name of a workflow, such as vote; `troupe roles` lists all. It has its default options unless the "
    "configuration uses it.",
)
@click.option("--temperature", type=click.FloatRange(0, 2), help="Sample every role's replies at this temperature.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of sampling. The same seed gives the same replies."
)
@click.option("--watch", is_flag=True, help="Show each engine's share, KV cache, concurrency, queue and step cost.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: an object for each problem.")
def solve(
    problem: str | None,
    file: Path | None,
    compare: str | None,
    out: Path | None,
    resume: bool,
    concurrency: int,
    config: str,
    workflow: str | None,
    temperature: float | None,
    seed: int,
    watch: bool,
    as_json: bool,
) -> None:
    """Solve PROBLEM, or every problem in a file, with the team.

    \b
    troupe solve "(12+7)*3-45"
    troupe solve --file problems.jsonl --out results.jsonl

    Interrupt a run with Ctrl-C, and continue it with --resume: the results in --out are kept.
    """
    if (problem is None) == (file is None):
        raise click.UsageError("give one PROBLEM or --file")
    if resume and not out:
        raise click.UsageError("--resume needs --out, the file of results to continue")
    if compare and not file:
        raise click.UsageError("--compare needs --file, whose problems have expected answers")
    if out and not file:
        raise click.UsageError("--out needs --file")
    chosen = configuration.load(config)
    chosen = chosen.with_workflow(workflow) if workflow else chosen
    team = assemble(chosen)
    options = Options(out, resume, concurrency, temperature, seed, watch, as_json)
    if problem is not None:
        team.check(problem)
        code = interrupt.run(_solve_one(chosen, team, options.job(Problem("1", problem)), options))
    else:
        assert file is not None
        asked = problems.read(file, Comparison(compare) if compare else None)
        code = _solve_file(chosen, team, asked, options)
    raise SystemExit(code)


async def _solve_one(config: Config, team: Team, job: Job, options: Options) -> int:
    """Work a job, print its steps and answer, and return the exit code."""
    screen = Console(stderr=True, highlight=False)
    output = Console(quiet=True) if options.as_json else solve_screen.output_console(screen)
    folder = run_folder.create()
    logs.log_to(folder)
    status = Spinner("dots")
    engine_progress = solve_screen.EngineProgress()
    running: RunningTeam | None = None

    def show(event: Event) -> None:
        if isinstance(event, EngineChanged | NodesAwaited):
            status.update(text=engine_progress.update(event))
        elif isinstance(event, RoleReplied):
            status.update(text="working")
            for entry in event.entries:
                output.print(solve_screen.entry_line(entry), soft_wrap=True)
        elif isinstance(event, ToolCalled):
            status.update(text=f"{event.seat} uses {event.call.tool}")
        elif isinstance(event, ToolReturned):
            output.print(solve_screen.entry_line(tool_entry(event.seat, event.use)), soft_wrap=True)

    with watch.live(screen, status, lambda: running, options.watching):
        async with (
            traced(config) as tracing,
            start_team(config, team, folder, fan_out(tracing.on_event, show)) as running,
        ):
            result = await running.orchestrator.run(job)
            if options.watching:
                screen.print(watch.tables(running))
            status.update(text="closing the engines")
    if options.as_json:
        click.echo(json.dumps(result.as_json(), ensure_ascii=False))
    elif result.error:
        screen.print(f"[red]no answer:[/] {escape(result.error)}")
    else:
        output.print(solve_screen.answer_line(result), soft_wrap=True)
    return 1 if result.error else 0


def _solve_file(config: Config, team: Team, asked: list[Problem], options: Options) -> int:
    """Work the problems that have no result yet, report all results, and return the exit code."""
    kept = read_kept(options.out, options.resume, asked) if options.out else {}
    checked = [_check(team, problem) for problem in asked]
    faulty = [JobResult(p.id, p.problem, None, expected=p.expected, error=p.fault) for p in checked if p.fault]
    jobs = [options.job(problem) for problem in checked if problem.fault is None and problem.id not in kept]
    if kept:
        click.echo(f"{len(kept)} problems are done, {len(jobs)} to go", err=True)
    total = len(kept) + len(faulty) + len(jobs)
    with Report(options.out, list(kept.values()), options.as_json, total, options.watching) as report:
        for result in faulty:
            report.add(result)
        if jobs:
            interrupt.run(_work(config, team, jobs, options.concurrency, report))
    report.print_summary()
    return 1 if any(result.error for result in report.results) else 0


def _check(team: Team, problem: Problem) -> Problem:
    """Return the problem, with its fault if the team cannot work it."""
    if problem.fault is not None:
        return problem
    try:
        team.check(problem.problem, problem.compare)
    except (InputError, PluginError) as error:
        return replace(problem, fault=str(error))
    return problem


async def _work(config: Config, team: Team, jobs: list[Job], concurrency: int, report: Report) -> None:
    folder = run_folder.create()
    logs.log_to(folder)
    async with (
        traced(config) as tracing,
        start_team(config, team, folder, fan_out(tracing.on_event, report.on_event)) as running,
    ):
        report.running_team = running
        await work_all(running.orchestrator, jobs, concurrency, report.add)
        report.print_engines()
