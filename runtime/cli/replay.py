"""`troupe replay`: another policy over a log of decisions."""

import asyncio
import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from runtime.config import PolicyChoice
from runtime.control import catalogue, decision_log
from runtime.control.contained_policy import ContainedPolicy
from runtime.control.replay import Replay


@click.command()
@click.argument("log", type=click.Path(path_type=Path))
@click.option("--policy", "-p", default=catalogue.DEFAULT, show_default=True, help="The policy to decide instead.")
@click.option("--show", type=click.IntRange(0), default=20, show_default=True, help="Differences to print.")
@click.option("--json", "as_json", is_flag=True, help="As JSON: every difference, then what they come to.")
def replay(log: Path, policy: str, show: int, as_json: bool) -> None:
    """Run another policy over LOG, the decisions.jsonl of a run's folder, and print where it would have differed."""
    choice = PolicyChoice(name=policy)
    replayed = Replay(ContainedPolicy(choice.name, catalogue.make(choice.name, place="--policy")))
    differences = asyncio.run(replayed.over(decision_log.read(log)))
    totals = {
        "records": replayed.records,
        "without_a_decision": replayed.without_a_decision,
        "faults": replayed.faults,
        "differing": replayed.differing,
        "largest_difference": round(replayed.largest, 4),
    }
    if as_json:
        for difference in differences:
            click.echo(json.dumps(asdict(difference)))
        click.echo(json.dumps({"summary": totals}))
        return
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("record", "engine", "share", policy, "reason", f"{policy}'s reason"):
        shown.add_column(column)
    for d in differences[:show]:
        shares = (f"{d.share:.2%}", f"{d.other_share:.2%}")
        shown.add_row(str(d.record), d.engine, *shares, d.reason, d.other_reason)
    if differences[:show]:
        Console().print(shown)
    more = f"; {len(differences) - show} more differences with --show" if len(differences) > show else ""
    click.echo(
        f"{policy} would have differed at {replayed.differing} of {replayed.records} decisions, "
        f"by up to {replayed.largest:.0%} of an engine's KV cache{more}"
    )
