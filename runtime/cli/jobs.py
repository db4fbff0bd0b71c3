"""`troupe jobs`: the jobs in the journal, whether the service runs or not."""

import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from runtime import config as configuration
from runtime import paths
from runtime.errors import InputError
from runtime.jobs import journal as store
from runtime.jobs.job import JobState
from runtime.jobs.journal import Connection, JobRecord

_config = click.option(
    "--config", "-c", default=configuration.DEFAULT, show_default=True, help="Whose jobs: a file, or a shipped name."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON: an object a line.")
_state = click.option(
    "--state", type=click.Choice([str(state) for state in JobState]), help="Only those in this state."
)


@click.group()
def jobs() -> None:
    """List, show, cancel and export jobs, whether `troupe serve` runs or not."""


@jobs.command("list")
@_config
@_state
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many, the newest.")
@_json
def list_(config: str, state: str | None, limit: int, as_json: bool) -> None:
    """The newest jobs; of each id its beginning, which is enough to name it."""
    with _journal(config) as sql:
        found = store.jobs(sql, JobState(state) if state else None, limit=limit)
        counts = store.counts(sql)
    if as_json:
        for record in found:
            click.echo(json.dumps(record.as_json()))
        return
    table = Table("id", "state", "submitted", "took", "problem", "answer", box=None, pad_edge=False)
    for record in found:
        took = f"{record.ended_at - record.submitted_at:.2f} s" if record.ended_at else ""
        answer = str((record.result or {}).get("answer") or "")
        problem = escape(record.submission.problem)
        table.add_row(record.id[:12], record.state, _when(record.submitted_at), took, problem, escape(answer))
    screen = Console(highlight=False)
    screen.print(table)
    screen.print(", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no jobs")


@jobs.command()
@click.argument("id")
@_config
@_json
def show(id: str, config: str, as_json: bool) -> None:
    """One job, by its id or the beginning of it: what was asked, what happened, and its result."""
    with _journal(config) as sql:
        record = _found(sql, id)
        events = store.events(sql, job=record.id, limit=1_000_000)
    if as_json:
        click.echo(json.dumps({**record.as_json(), "events": [event.as_json() for event in events]}))
        return
    screen = Console(highlight=False)
    screen.print(f"{record.id}  {record.state}  {escape(record.submission.problem)}")
    for event in events:
        why = event.data.get("why")
        entries = event.data.get("entries", [])
        lines = [f"{e['role']}: {e['input']} → {e['output']}" for e in entries] or [
            f"{event.kind}{f': {why}' if why else ''}"
        ]
        for line in lines:
            screen.print(f"  {_when(event.at)}  {escape(line)}", soft_wrap=True)
    if record.result:
        screen.print(f"answer: {escape(str(record.result.get('answer')))}")


@jobs.command()
@click.argument("ids", nargs=-1, required=True)
@_config
def cancel(ids: tuple[str, ...], config: str) -> None:
    """Cancel jobs; a service that runs stops working them within a second."""
    with _journal(config) as sql:
        found = [_found(sql, id) for id in ids]
    with store.transaction(_path(config)) as transaction:
        cancelled = {record.id: transaction.move(record.id, JobState.CANCELLED, why="cancelled") for record in found}
    for id, was in cancelled.items():
        click.echo(f"{id}  {'cancelled' if was else 'had ended already'}")


@jobs.command()
@click.argument("out", type=click.Path(path_type=Path))
@_config
@_state
def export(out: Path, config: str, state: str | None) -> None:
    """Write all jobs to OUT, a line of JSON each, the oldest first; `-` for standard output."""
    count = 0
    with _journal(config) as sql, click.open_file(str(out), "w", encoding="utf-8") as file:
        for record in store.all_jobs(sql, JobState(state) if state else None):
            file.write(json.dumps(record.as_json()) + "\n")
            count += 1
    click.echo(f"{count} jobs", err=True)


def _path(config: str) -> Path:
    path = paths.journal(configuration.load(config).service)
    if not path.exists():
        raise InputError(f"there is no journal at {path}: no service of this configuration has run yet")
    return path


@contextmanager
def _journal(config: str) -> Iterator[Connection]:
    with closing(store.connect(_path(config))) as sql:
        yield sql


def _found(sql: Connection, id: str) -> JobRecord:
    found = store.job(sql, id) or next(iter(store.jobs_like(sql, id)), None)
    if found is None:
        raise InputError(f"there is no job {id!r}")
    if found.id != id and len(store.jobs_like(sql, id)) > 1:
        raise InputError(f"several jobs begin with {id!r}: give more of the id")
    return found


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
