"""The report of `troupe solve --file`: writes or prints each result, and shows a progress bar and a summary."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from runtime.assembly import RunningTeam
from runtime.cli import solve_screen, watch
from runtime.cli.results_file import ResultsFile
from runtime.events import EngineChanged, Event, NodesAwaited
from runtime.jobs import problems
from runtime.jobs.batch import summarise
from runtime.jobs.job import JobResult

FAILED_SHOWN = 10
"""Ids of failed problems that are listed in the summary."""


class Report:
    """A context manager over the progress bar and, if there is one, the file of results.

    A result goes to the file `out` or, if there is none, to standard output. `kept` are results of an earlier run. The
    owner sets `running_team` once its engines are ready; `watching` shows them below the bar.
    """

    def __init__(self, out: Path | None, kept: Sequence[JobResult], as_json: bool, total: int, watching: bool) -> None:
        self.running_team: RunningTeam | None = None
        self.results = list(kept)
        self._as_json = as_json
        self._watching = watching
        self._screen = Console(stderr=True, highlight=False)
        self._output = solve_screen.output_console(self._screen)
        self._file = ResultsFile(out, kept) if out else None
        self._engine_progress = solve_screen.EngineProgress()
        self._right = self._judged = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[accuracy]}"),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task("starting", total=total, completed=len(kept), rate="", accuracy="")
        self._owned = ExitStack()
        for result in kept:
            self._count(result)

    def __enter__(self) -> Self:
        if self._file:
            self._owned.enter_context(self._file)
        self._owned.enter_context(watch.live(self._screen, self._bar, lambda: self.running_team, self._watching))
        return self

    def __exit__(self, *exc: object) -> None:
        self._owned.close()

    def on_event(self, event: Event) -> None:
        """Show on the bar how the team starts and closes."""
        if isinstance(event, EngineChanged | NodesAwaited):
            self._bar.update(self._task, description=self._engine_progress.update(event))

    def add(self, result: JobResult) -> None:
        """Write or print a result, and count it. Raises TroupeError if the file cannot be written."""
        self.results.append(result)
        if self._file:
            self._file.write(result)
        elif self._as_json:
            click.echo(problems.line(result))
        elif result.error is None:
            self._output.print(solve_screen.result_line(result), soft_wrap=True)
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

    def print_engines(self) -> None:
        """Print the table of engines above the bar, if they are watched."""
        if self._watching and self.running_team:
            self._screen.print(watch.tables(self.running_team))

    def print_summary(self) -> None:
        """Print the totals of all results, kept ones included: as JSON to standard output, else to the screen."""
        summary = summarise(self.results)
        if self._as_json:
            click.echo(json.dumps({"summary": summary.as_json()}))
        else:
            self._screen.print(solve_screen.summary_lines(summary))
        failed = [result.id for result in self.results if result.error]
        if failed:
            more = f" and {len(failed) - FAILED_SHOWN} more" if len(failed) > FAILED_SHOWN else ""
            self._screen.print(f"[red]failed:[/] {escape(', '.join(failed[:FAILED_SHOWN]) + more)}", soft_wrap=True)

    def _count(self, result: JobResult) -> None:
        if result.correct is not None:
            self._judged += 1
            self._right += result.correct
