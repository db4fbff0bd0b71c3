"""`troupe replay`: run another policy over a decision log."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from runtime.config import PolicyChoice
from runtime.control import catalogue, decision_log
from runtime.control.contained_policy import ContainedPolicy
from runtime.control.pauses import is_paused
from runtime.control.replay import Difference, Replay
from runtime.engines.grant import Grant


@click.command()
@click.argument("log", type=click.Path(path_type=Path))
@click.option("--policy", "-p", default=catalogue.DEFAULT, show_default=True, help="The policy to run over the log.")
@click.option("--show", type=click.IntRange(0), default=20, show_default=True, help="Number of differences to print.")
@click.option("--json", "as_json", is_flag=True, help="Print every difference as JSON, then a summary.")
def replay(log: Path, policy: str, show: int, as_json: bool) -> None:
    """Run another policy over a decision log and print where it would have decided differently.

    LOG is the decisions.jsonl in a run's folder.
    """
    choice = PolicyChoice(name=policy)
    replayed = Replay(ContainedPolicy(choice.name, catalogue.make(choice.name, place="--policy")))
    differences = asyncio.run(replayed.over(decision_log.read(log)))
    if as_json:
        _print_json(replayed, differences)
    else:
        _print_table(replayed, policy, differences, show)


def _print_json(replayed: Replay, differences: Sequence[Difference]) -> None:
    for difference in differences:
        click.echo(json.dumps(asdict(difference)))
    summary = {
        "records": replayed.records,
        "without_a_decision": replayed.without_a_decision,
        "faults": replayed.faults,
        "differing": replayed.differing,
        "pausing": replayed.pausing,
        "largest_difference": round(replayed.largest, 4),
    }
    click.echo(json.dumps({"summary": summary}))


def _print_table(replayed: Replay, policy: str, differences: Sequence[Difference], show: int) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("record", "engine", "grant", policy, "reason", f"{policy}'s reason"):
        table.add_column(column)
    for d in differences[:show]:
        grants = (_described(d.grant, d.other_grant), _described(d.other_grant, d.grant))
        table.add_row(str(d.record), d.engine, *grants, d.reason, d.other_reason)
    if table.row_count:
        Console().print(table)
    hidden = len(differences) - show
    more = f"; --show {len(differences)} prints {hidden} more" if hidden > 0 else ""
    click.echo(
        f"{policy} would have decided differently at {replayed.differing} of {replayed.records} decisions, "
        f"by up to {replayed.largest:.0%} of an engine's KV cache; at {replayed.pausing}, only one of the policies "
        f"pauses an engine's admission{more}"
    )


def _described(grant: Grant, other: Grant) -> str:
    """Return a grant's share, and its concurrency and tokens per step if those of the other grant differ."""
    parts = [f"{grant.gpu_memory_utilization:.2%}"]
    if grant.max_active_seqs != other.max_active_seqs:
        parts.append("paused" if is_paused(grant) else f"{grant.max_active_seqs} sequences")
    if grant.max_step_tokens != other.max_step_tokens:
        parts.append(f"{grant.max_step_tokens} tokens a step")
    return ", ".join(parts)
