"""`troupe solve`: one problem, or a file of them, through the team."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.spinner import Spinner

from agents.workflow import Entry
from runtime import config as configuration
from runtime import logs, run_folder
from runtime.assembly import start_team
from runtime.cli import interrupt
from runtime.cli.watch import table
from runtime.config import Config
from runtime.engines.handle import EngineHandle, EngineState
from runtime.errors import InputError, PluginError, TroupeError
from runtime.events import EngineChanged, Event, RoleReplied
from runtime.jobs import problems
from runtime.jobs.batch import Summary, summarise, work_all
from runtime.jobs.job import Job, JobResult
from runtime.jobs.problems import Problem
from runtime.jobs.team import Team, assemble


@click.command()
@click.argument("problem", required=False)
@click.option(
    "--file", "-f", type=click.Path(path_type=Path), help='Problems, a line each: {"id", "problem", "answer"}.'
)
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Write results here, a line of JSON each.")
@click.option("--resume", is_flag=True, help="Go on from what is in --out; failed problems are tried again.")
@click.option("--concurrency", type=click.IntRange(1), default=32, show_default=True, help="Problems worked at once.")
@click.option("--config", "-c", default=configuration.DEFAULT, show_default=True, help="A file, or a shipped name.")
@click.option("--workflow", "-w", help="deliberate, vote, solo, or one of your own, at its defaults.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="Sample every role at this temperature.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampling; the same seed, the same replies.")
@click.option("--watch", is_flag=True, help="Show each engine's share, KV cache, concurrency and queue meanwhile.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: an object a problem.")
def solve(
    problem: str | None,
    file: Path | None,
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
    """Solve PROBLEM, or every line of a file, with the team.

    \b
    troupe solve "(12+7)*3-45"
    troupe solve --file problems.jsonl --out results.jsonl
    """
    if (problem is None) == (file is None):
        raise click.UsageError("give one PROBLEM or --file")
    if resume and not out:
        raise click.UsageError("--resume goes on from a file of results: give --out too")
    if out and not file:
        raise click.UsageError("--out goes with --file")
    chosen = configuration.load(config)
    chosen = chosen.with_workflow(workflow) if workflow else chosen
    team = assemble(chosen)

    def job(p: Problem) -> Job:
        return Job(p.id, p.problem, p.expected, temperature, seed)

    if problem is not None:
        team.check(problem)
        code = interrupt.run(_solve_one(chosen, team, job(Problem("1", problem)), watch, as_json))
    else:
        assert file is not None
        code = _solve_file(chosen, team, problems.read(file), job, concurrency, out, resume, watch, as_json)
    raise SystemExit(code)


async def _solve_one(config: Config, team: Team, job: Job, watch: bool, as_json: bool) -> int:
    screen = Console(stderr=True, highlight=False)
    lines = Console(quiet=True) if as_json else _lines(screen)
    folder = run_folder.create()
    logs.log_to(folder)
    status = Spinner("dots")
    engines: dict[str, EngineHandle] = {}
    with _live(screen, status, engines, team, watch):

        def show(event: Event) -> None:
            if isinstance(event, EngineChanged):
                status.update(text=_starting(event, waiting))
            elif isinstance(event, RoleReplied):
                status.update(text="working")
                for entry in event.entries:
                    lines.print(_entry(entry), soft_wrap=True)

        waiting: dict[str, EngineState] = {}
        async with start_team(config, team, folder, show) as running:
            engines.update(running.engines)
            result = await running.orchestrator.run(job)
            if watch:
                screen.print(table(engines, team))
            status.update(text="closing the engines")
    if as_json:
        click.echo(json.dumps(result.as_json(), ensure_ascii=False))
    elif result.error:
        screen.print(f"[red]no answer:[/] {escape(result.error)}")
    else:
        doubt = "  [yellow](not confirmed by the critic)[/]" if result.confirmed is False else ""
        lines.print(f"[bold]answer: {escape(str(result.answer))}[/]{doubt}", soft_wrap=True)
    return 1 if result.error else 0


def _solve_file(
    config: Config,
    team: Team,
    asked: list[Problem],
    job: Callable[[Problem], Job],
    concurrency: int,
    out: Path | None,
    resume: bool,
    watch: bool,
    as_json: bool,
) -> int:
    kept = _kept(out, resume, asked)
    faulty = [_check(team, p) for p in asked]
    results = [JobResult(p.id, p.problem, None, expected=p.expected, error=p.fault) for p in faulty if p.fault]
    due = [p for p in faulty if p.fault is None and p.id not in kept]
    if kept:
        click.echo(f"{len(kept)} problems are done, {len(due)} to go", err=True)
    total = len(kept) + len(results) + len(due)
    with _Report(out, list(kept.values()), as_json, total, team, watch) as report:
        for result in results:
            report.take(result)
        if due:
            interrupt.run(_work(config, team, [job(p) for p in due], concurrency, report))
    report.summary()
    return 1 if any(result.error for result in report.results) else 0


def _kept(out: Path | None, resume: bool, asked: list[Problem]) -> dict[str, JobResult]:
    """The results that a resumed run keeps, by id: answers, to the same problem where it is asked again.

    Raises InputError when a file would be overwritten.
    """
    if out is None:
        return {}
    if out.exists() and not resume:
        raise InputError(f"{out} is there already: --resume goes on from it, another --out leaves it alone")
    if not out.parent.is_dir():
        raise InputError(f"--out: there is no folder {out.parent}")
    if out.exists() and not out.is_file():
        raise InputError(f"--out: {out} is no file")
    by_id = {p.id: p for p in asked}
    kept = (r for r in problems.done(out) if r.error is None)
    return {
        r.id: replace(r, expected=by_id[r.id].expected) if r.id in by_id else r
        for r in kept
        if r.id not in by_id or by_id[r.id].problem == r.problem
    }


def _check(team: Team, problem: Problem) -> Problem:
    """The problem with its fault, if the team could not work it."""
    if problem.fault is not None:
        return problem
    try:
        team.check(problem.problem)
    except (InputError, PluginError) as error:
        return replace(problem, fault=str(error))
    return problem


async def _work(config: Config, team: Team, jobs: list[Job], concurrency: int, report: "_Report") -> None:
    folder = run_folder.create()
    logs.log_to(folder)
    async with start_team(config, team, folder, report.show) as running:
        report.engines.update(running.engines)
        await work_all(running.orchestrator, jobs, concurrency, report.take)
        report.engines_at_the_end()


class _Report:
    """Results to the file or the screen as they come, and the bar above which they appear."""

    def __init__(
        self, out: Path | None, kept: list[JobResult], as_json: bool, total: int, team: Team, watch: bool
    ) -> None:
        self.engines: dict[str, EngineHandle] = {}
        self.results = list(kept)
        self._as_json = as_json
        self._screen = Console(stderr=True, highlight=False)
        self._lines = _lines(self._screen)
        self._right = self._judged = 0
        self._file: IO[str] | None = _rewritten(out, kept) if out else None
        self._waiting: dict[str, EngineState] = {}
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[accuracy]}"),
            TimeRemainingColumn(),
        )
        self._team, self._watch = team, watch
        self._live = _live(self._screen, self._bar, self.engines, team, watch)
        for result in kept:
            self._count(result)
        self._task = self._bar.add_task("starting", total=total, completed=len(kept), rate="", accuracy="")

    def __enter__(self) -> "_Report":
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()
        if self._file:
            self._file.close()

    def show(self, event: Event) -> None:
        """What happens, on the bar."""
        if isinstance(event, EngineChanged):
            self._bar.update(self._task, description=_starting(event, self._waiting))

    def engines_at_the_end(self) -> None:
        """The engines once more for those who watched, above what follows."""
        if self._watch:
            self._screen.print(table(self.engines, self._team))

    def take(self, result: JobResult) -> None:
        """One result: kept, written, shown."""
        self.results.append(result)
        if self._file:
            try:
                self._file.write(problems.line(result) + "\n")
                self._file.flush()
            except OSError as error:
                raise TroupeError(f"--out: {error.strerror}; what was written before is kept") from None
        elif self._as_json:
            click.echo(problems.line(result))
        elif result.error is None:
            self._lines.print(_result(result), soft_wrap=True)
        if result.error is not None:
            self._screen.print(f"[red]{escape(result.id)}:[/] {escape(result.error)}", soft_wrap=True)
        self._count(result)
        speed = self._bar.tasks[0].speed
        self._bar.update(
            self._task,
            advance=1,
            rate=f"{speed:.1f}/s" if speed else "",
            accuracy=f"{self._right}/{self._judged} right" if self._judged else "",
        )

    def _count(self, result: JobResult) -> None:
        if result.correct is not None:
            self._judged += 1
            self._right += result.correct

    def summary(self) -> None:
        """What all results come to, kept ones too, to the screen; as JSON the last line of the output."""
        summary = summarise(self.results)
        if self._as_json:
            click.echo(json.dumps({"summary": summary.as_json()}))
        else:
            self._screen.print(_summary(summary))
        failed = [result.id for result in self.results if result.error]
        if failed:
            shown = ", ".join(failed[:10]) + (f" and {len(failed) - 10} more" if len(failed) > 10 else "")
            self._screen.print(f"[red]failed:[/] {escape(shown)}", soft_wrap=True)


def _live(
    screen: Console, progress: RenderableType, engines: Mapping[str, EngineHandle], team: Team, watch: bool
) -> Live:
    """The lower edge of the screen: progress, and below it the engines for those who watch."""

    def shown() -> RenderableType:
        return Group(progress, table(engines, team)) if watch and engines else progress

    return Live(get_renderable=shown, console=screen, transient=True, refresh_per_second=10)


def _lines(screen: Console) -> Console:
    """Where results go: standard output; on a terminal the screen's own console, which keeps them off the bar."""
    output = Console(highlight=False)
    return screen if output.is_terminal and screen.is_terminal else output


def _rewritten(out: Path, kept: list[JobResult]) -> IO[str]:
    """The file of results holding what is kept, whole, and open for more. Replaced in one move: nothing is lost."""
    real = out.resolve()
    try:
        if kept:
            handle, fresh = tempfile.mkstemp(prefix=f".{real.name}.", dir=real.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.writelines(f"{problems.line(result)}\n" for result in kept)
            Path(fresh).chmod(real.stat().st_mode)
            Path(fresh).replace(real)
        return real.open("a" if kept else "w", encoding="utf-8")
    except OSError as error:
        raise TroupeError(f"--out: {out}: {error.strerror}") from None


def _starting(event: EngineChanged, engines: dict[str, EngineState]) -> str:
    engines[event.engine] = event.state
    if event.state is EngineState.CLOSED:
        return "closing the engines"
    if all(state is EngineState.READY for state in engines.values()):
        return "solving"
    return ", ".join(f"{name} {state}" for name, state in engines.items())


def _entry(entry: Entry) -> str:
    mark = {"accepted": "[green]✓[/]", "rejected": "[red]✗[/]"}.get(str(entry.verdict), " ")
    return f"{mark} [cyan]{escape(f'{entry.seat:<10}')}[/] {escape(entry.input)}  →  {escape(entry.output)}"


def _result(result: JobResult) -> str:
    mark = {True: "[green]✓[/]", False: "[red]✗[/]", None: " "}[result.correct]
    wanted = f"  (expected {result.expected})" if result.correct is False else ""
    doubt = "  [yellow](not confirmed)[/]" if result.confirmed is False else ""
    answer = f"[bold]{escape(str(result.answer))}[/]{wanted}{doubt}"
    return f"{mark} [cyan]{escape(result.id)}[/]  {escape(result.problem)}  →  {answer}"


def _summary(summary: Summary) -> str:
    accuracy = "" if summary.accuracy is None else f", {summary.accuracy:.1%} right"
    costs = [used.cost for used in summary.usage.values() if used.cost is not None]
    cost = f"; cost {sum(costs):.6f}" if costs else ""
    tokens = ", ".join(f"{seat} {used.prompt_tokens}+{used.completion_tokens}" for seat, used in summary.usage.items())
    return (
        f"{summary.problems} problems, {summary.failed} failed, {summary.unconfirmed} not confirmed{accuracy}\n"
        f"job time p50 {summary.job_time_p50_s:.2f} s, p90 {summary.job_time_p90_s:.2f} s, "
        f"p99 {summary.job_time_p99_s:.2f} s; tokens in+out: {tokens or 'none'}{cost}"
    )
