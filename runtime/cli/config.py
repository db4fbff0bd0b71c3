"""`troupe config`: look at a configuration, or say what is wrong with one."""

import json

import click

from runtime import config as configuration
from runtime.control.contained_policy import ContainedPolicies
from runtime.jobs import team as teams


@click.group()
def config() -> None:
    """Check a configuration, or show it with every default."""


@config.command()
@click.argument("file")
def check(file: str) -> None:
    """Hold FILE (or the name of a shipped configuration) against everything it names, without starting an engine."""
    found = configuration.load(file)
    team = teams.assemble(found)
    ContainedPolicies(found.control.policy, found.control.shadow, threads=False)
    click.echo(f"{found.source}: OK ({len(found.engines)} engines; {', '.join(team.seats)}; {found.workflow.name})")


@config.command()
@click.argument("name", default=configuration.DEFAULT)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def show(name: str, as_json: bool) -> None:
    """Print a configuration with every default written out: a file, or a shipped one by NAME (default: embedded)."""
    found = configuration.load(name)
    click.echo(
        json.dumps(found.model_dump(mode="json"), indent=2) if as_json else configuration.as_yaml(found), nl=as_json
    )
