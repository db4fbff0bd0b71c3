"""`troupe jobs`: list, show, cancel and export the jobs in the journal, whether the service runs or not."""

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
from runtime.cli.config_option import config_option
from runtime.errors import InputError
from runtime.jobs.job import JobState
from runtime.jobs.journal import queries, records
from runtime.jobs.journal.database import Connection, connect
from runtime.jobs.journal.records import JobEvent, JobRecord
from runtime.jobs.journal.transaction import open_transaction

_config = config_option()
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")
_state = click.option("--state", type=click.Choice([str(state) for state in JobState]), help="Only jobs in this state.")


@click.group()
def jobs() -> None:
    """List, show, cancel and export jobs, whether `troupe serve` runs or not."""


@jobs.command("list")
@_config
@_state
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="List at most this many jobs.")
@_json
def list_(config: str, state: str | None, limit: int, as_json: bool) -> None:
    """List the newest jobs. `show` and `cancel` accept the shortened ids that this command prints."""
    with _journal(config) as sql:
        listed = queries.jobs(sql, JobState(state) if state else None, limit=limit)
        counts = queries.counts(sql)
    if as_json:
        for record in listed:
            click.echo(json.dumps(record.as_json()))
        return
    table = Table("id", "state", "submitted", "took", "problem", "answer", box=None, pad_edge=False)
    for record in listed:
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
    """Show a job's problem, events and result. ID may be the beginning of its id."""
    with _journal(config) as sql:
        record = _find(sql, id)
        events = queries.events(sql, job=record.id, limit=None)
    if as_json:
        click.echo(json.dumps({**record.as_json(), "events": [event.as_json() for event in events]}))
        return
    screen = Console(highlight=False)
    screen.print(f"{record.id}  {record.state}  {escape(record.submission.problem)}")
    for event in events:
        for line in _event_lines(event):
            screen.print(f"  {_when(event.at)}  {escape(line)}", soft_wrap=True)
    if record.result:
        screen.print(f"answer: {escape(str(record.result.get('answer')))}")


@jobs.command()
@click.argument("ids", nargs=-1, required=True)
@_config
def cancel(ids: tuple[str, ...], config: str) -> None:
    """Cancel jobs. A running service stops working on them within a second."""
    with _journal(config) as sql:
        records = [_find(sql, id) for id in ids]
    with open_transaction(_path(config)) as transaction:
        cancelled = {record.id: transaction.move(record.id, JobState.CANCELLED, why="cancelled") for record in records}
    for id, is_cancelled in cancelled.items():
        click.echo(f"{id}  {'cancelled' if is_cancelled else 'had already ended'}")


@jobs.command()
@click.argument("out", type=click.Path(path_type=Path))
@_config
@_state
def export(out: Path, config: str, state: str | None) -> None:
    """Write all jobs to OUT as one line of JSON each, oldest first. OUT may be `-` for standard output."""
    count = 0
    try:
        with _journal(config) as sql, click.open_file(str(out), "w", encoding="utf-8") as file:
            for record in queries.all_jobs(sql, JobState(state) if state else None):
                file.write(json.dumps(record.as_json()) + "\n")
                count += 1
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from None
    click.echo(f"{count} jobs", err=True)


def _path(config: str) -> Path:
    path = paths.journal(configuration.load(config).service)
    if not path.exists():
        raise InputError(f"there is no journal at {path}: start `troupe serve` with this configuration first")
    return path


@contextmanager
def _journal(config: str) -> Iterator[Connection]:
    with closing(connect(_path(config))) as sql:
        yield sql


def _find(sql: Connection, id: str) -> JobRecord:
    """Return the job whose id is, or starts with, `id`. Raises InputError if there is none, or more than one."""
    record = queries.job(sql, id)
    if record is not None:
        return record
    records = queries.jobs_with_prefix(sql, id)
    if not records:
        raise InputError(f"there is no job {id!r}; `troupe jobs list` prints the ids")
    if len(records) > 1:
        raise InputError(f"the ids of several jobs start with {id!r}; give more of the id")
    return records[0]


def _event_lines(event: JobEvent) -> list[str]:
    """Return what to print for an event: entries of the transcript, a tool and its output, or its kind and reason."""
    entries = event.data.get("entries", [])
    match event.kind:
        case records.TOOL_CALLED:
            arguments = json.dumps(event.data["arguments"], ensure_ascii=False)
            return [f"{event.data['seat']} uses {event.data['tool']} {arguments}"]
        case records.TOOL_RETURNED:
            result = "failed" if event.data["failed"] else "returned"
            return [f"{event.data['tool']} {result}: {event.data['output']}"]
    if entries:
        return [
            f"{entry['role']}: {entry['input']} → {entry['output']}"
            + (f" ({entry['note']})" if entry.get("note") else "")
            for entry in entries
        ]
    why = event.data.get("why")
    return [f"{event.kind}: {why}" if why else event.kind]


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
