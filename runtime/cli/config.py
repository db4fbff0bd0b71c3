"""`troupe config`: checks and shows configurations."""

import asyncio
import json

import click

from runtime import config as configuration
from runtime.assembly import needed_engines, needed_tools
from runtime.control.contained_policy import ContainedPolicies
from runtime.devices.placement import place
from runtime.devices.selection import group_size, groups, name_of, sizes
from runtime.jobs import team as teams
from runtime.tools.toolbox import Toolbox


@click.group()
def config() -> None:
    """Check a configuration, or print it with every default.

    \b
    troupe config check team.yaml
    troupe config show embedded
    """


@config.command()
@click.argument("file")
def check(file: str) -> None:
    """Check FILE, a configuration or the name of a shipped one, without starting an engine.

    The check covers keys and values, the folders of models, roles, the workflow, policies and tools. It starts the MCP
    servers of the team, and ends them. If something is wrong, the command prints the file and the key, and exits with
    code 2.

    \b
    troupe config check team.yaml
    """
    found = configuration.load(file)
    team = teams.assemble(found)
    asyncio.run(_start_tools(found, team))
    ContainedPolicies(found.control.policy, found.control.shadow, threads=False)
    specs = needed_engines(found, team)
    if found.devices == "all":  # how many these are depends on the machine
        group_size(found, specs)
    else:
        devices = {name_of(group): group for group in groups(found, 0)}
        place(specs, [*devices], [name for name in specs if found.may_sleep(name)], gpus=sizes(devices))
    click.echo(f"{found.source}: OK ({len(found.engines)} engines; {', '.join(team.seats)}; {found.workflow.name})")


@config.command()
@click.argument("name", default=configuration.DEFAULT)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of YAML.")
def show(name: str, as_json: bool) -> None:
    """Print the configuration NAME, a file or a shipped one, with every default filled in.

    Without NAME, print the shipped configuration `embedded`.

    \b
    troupe config show
    troupe config show gpu-24gb
    """
    found = configuration.load(name)
    click.echo(
        json.dumps(found.model_dump(mode="json"), indent=2) if as_json else configuration.as_yaml(found), nl=as_json
    )


async def _start_tools(found: configuration.Config, team: teams.Team) -> None:
    """Start the tools that the team names, and end them."""
    async with Toolbox(needed_tools(found, team)):
        pass
