"""`troupe roles`: what roles and workflows there are, a package for a new role, what is wrong with one.

Exit codes of `check`: 0 nothing is wrong, 1 faults were found, 2 there is nothing such.
"""

import inspect
import json
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from agents import scaffold
from agents.check_role import check_role
from agents.registry import BrokenPlugin, Registered, UnknownName, find, registered, unreadable
from agents.role import TASKS, Role
from agents.yaml_role import SpecError, from_mapping
from runtime.config import read_yaml
from runtime.errors import ConfigError, InputError

PIPE_WIDTH_CHARACTERS = 300
"""Lines are not cut for a reader that is no terminal."""


@dataclass(frozen=True)
class Row:
    """One line of the list. `fault` says why it cannot be used; `summary` is its docstring's first line."""

    name: str
    origin: str
    takes: tuple[str, ...]
    summary: str
    fault: str | None


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_context
def roles(context: click.Context, as_json: bool) -> None:
    """List the roles and workflows, built in and from plug-ins; make a new role; check one."""
    if context.invoked_subcommand is None:
        _list(as_json)
    elif as_json:
        raise click.UsageError("--json belongs to the list: troupe roles --json")


@roles.command()
@click.argument("name")
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path), help="The package's folder [default: troupe-role-NAME]"
)
def new(name: str, folder: Path | None) -> None:
    """Write an installable package with the role NAME: its class, its test, and a configuration that runs it."""
    try:
        texts = scaffold.package(name, {entry.name for entry in registered("role")})
    except scaffold.NameRefused as error:
        raise InputError(str(error)) from None
    folder = folder or Path(scaffold.distribution(name))
    _write(folder, texts)
    click.echo(f"{folder}: {', '.join(texts)}")
    click.echo(f"next: pip install -e {shlex.quote(str(folder))} && troupe roles check {name}")
    click.echo(f'then: troupe solve --config {shlex.quote(str(folder / "team.yaml"))} "(12+7)*3-45"')


@roles.command()
@click.argument("what")
@click.pass_context
def check(context: click.Context, what: str) -> None:
    """Say what is wrong with a role: a registered name, module:Class, or a YAML file.

    The role is held against its contract over sample tasks; no model is asked.
    """
    faults = _faults(what)
    for fault in faults:
        click.echo(f"{what}: {fault}")
    if faults:
        context.exit(1)
    click.echo(f"{what}: OK")


def _list(as_json: bool) -> None:
    rows = {"roles": [_row(e) for e in registered("role")], "workflows": [_row(e) for e in registered("workflow")]}
    lost = [f"{origin}: its entry points cannot be read" for origin in unreadable()]
    if as_json:
        listed = {title: [asdict(row) for row in entries] for title, entries in rows.items()}
        click.echo(json.dumps({**listed, "unreadable": lost}, indent=2, ensure_ascii=False))
        return
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH_CHARACTERS)
    console.print(_table("role", rows["roles"], with_tasks=True))
    console.print()
    console.print(_table("workflow", rows["workflows"], with_tasks=False))
    for line in lost:
        console.print(line)


def _row(entry: Registered) -> Row:
    try:
        find(entry.kind, entry.name)  # which refuses a name that two distributions have
        found = entry.load()
    except BrokenPlugin as error:
        return Row(entry.name, entry.origin, (), "", error.why)
    takes = [kind for kind, task in TASKS.items() if issubclass(found, Role) and task in found.takes]
    return Row(entry.name, entry.origin, tuple(takes), (inspect.getdoc(found) or "").partition("\n")[0], None)


def _table(title: str, rows: list[Row], with_tasks: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(title, no_wrap=True)
    if with_tasks:
        table.add_column("takes")
    table.add_column("from")
    table.add_column("")
    for row in rows:
        says = f"broken: {row.fault}" if row.fault else row.summary
        takes = [", ".join(row.takes)] if with_tasks else []
        table.add_row(row.name, *takes, row.origin, says, style="red" if row.fault else None)
    return table


def _write(folder: Path, texts: Mapping[str, str]) -> None:
    """Write the files. Raises InputError where something is in the way."""
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty; give --dir a new folder or an empty one")
        for path, text in texts.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; give --dir another folder") from None


def _faults(what: str) -> list[str]:
    """What is wrong with the role that `what` leads to. Raises ConfigError when it leads nowhere."""
    try:
        if Path(what).suffix in (".yaml", ".yml"):
            return check_role(from_mapping(read_yaml(Path(what)), what))
        entry = _given(what) if ":" in what else find("role", what)
        return check_role(entry.load_role()())
    except UnknownName as error:
        raise ConfigError(f"{error}; or give module:Class, or a YAML file") from None
    except BrokenPlugin as error:
        if ":" in what and _is_absent(what, error.__cause__):
            raise ConfigError(f"there is no {what}: {error.why}") from None
        return [error.why]
    except SpecError as error:
        return str(error).removeprefix(f"{what}: ").split(f"\n{what}: ")


def _given(target: str) -> Registered:
    """A class given as module:Class, from the working folder too, as it is while one writes it."""
    if not re.fullmatch(r"[\w.]+:[\w.]+", target):
        raise ConfigError(f"{target!r} is not written as module:Class")
    sys.path.insert(0, str(Path.cwd()))
    return Registered(target, "role", "the command line", target)


def _is_absent(target: str, cause: BaseException | None) -> bool:
    """Whether an import failed for want of the module or class itself, not for what is inside."""
    module, _, name = target.partition(":")
    match cause:
        case ModuleNotFoundError():
            return f"{module}.".startswith(f"{cause.name}.")
        case AttributeError():
            return cause.name == name and cause.obj is sys.modules.get(module)
        case _:
            return False
