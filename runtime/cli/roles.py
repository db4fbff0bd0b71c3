"""`troupe roles`: list the roles, tasks, workflows and tools, write a package for a new role, check a role.

Exit codes of `check`: 0 if the role is sound, 1 if it has faults, 2 if there is no such role.
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
from agents.registry import BrokenPlugin, Kind, Registered, UnknownName, find, registered, unreadable
from agents.role import Role
from agents.yaml_role import SpecError, from_mapping
from runtime.config import read_yaml
from runtime.errors import ConfigError, InputError

PIPE_WIDTH_CHARACTERS = 300
"""The width of output that is not a terminal: wide enough that no line is cut."""


@dataclass(frozen=True)
class Row:
    """A line of the list. `takes` are the kinds of task that a role takes; it is empty for anything else.

    `summary` is the first line of the docstring. `fault` says why the object cannot be used; it is None for a sound
    one.
    """

    name: str
    origin: str
    takes: tuple[str, ...]
    summary: str
    fault: str | None


LISTED: Mapping[str, Kind] = {"roles": "role", "tasks": "task", "workflows": "workflow", "tools": "tool"}
"""The parts of the list, by their key in its JSON form."""


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def roles(context: click.Context, as_json: bool) -> None:
    """List all roles, kinds of task, workflows and tools, write a package for a new role, or check a role."""
    if context.invoked_subcommand is None:
        _list(as_json)
    elif as_json:
        raise click.UsageError("--json is an option of the list only: troupe roles --json")


@roles.command()
@click.argument("name")
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path), help="The folder of the package [default: troupe-role-NAME]"
)
def new(name: str, folder: Path | None) -> None:
    """Write an installable package with the role NAME: its class, its tests and a configuration that uses it."""
    try:
        texts = scaffold.package(name, {entry.name for entry in registered("role")})
    except scaffold.NameRefused as error:
        raise InputError(str(error)) from None
    folder = folder or Path(scaffold.distribution(name))
    _write(folder, texts)
    click.echo(f"Wrote {folder}: {', '.join(texts)}")
    click.echo(f"Install and check the role: pip install -e {shlex.quote(str(folder))} && troupe roles check {name}")
    click.echo(f'Try it: troupe solve --config {shlex.quote(str(folder / "team.yaml"))} "(12+7)*3-45"')


@roles.command()
@click.argument("what")
@click.pass_context
def check(context: click.Context, what: str) -> None:
    """Check a role: a registered name, module:Class or a YAML file.

    The check gives the role sample tasks and replies, and prints a line for each fault. It needs no model.
    """
    faults = _faults(what)
    for fault in faults:
        click.echo(f"{what}: {fault}")
    if faults:
        context.exit(1)
    click.echo(f"{what}: OK")


def _list(as_json: bool) -> None:
    rows = {title: [_row(entry) for entry in registered(kind)] for title, kind in LISTED.items()}
    unread = [f"{origin}: its entry points cannot be read" for origin in unreadable()]
    if as_json:
        listed = {title: [asdict(row) for row in entries] for title, entries in rows.items()}
        click.echo(json.dumps({**listed, "unreadable": unread}, indent=2, ensure_ascii=False))
        return
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH_CHARACTERS)
    for title, kind in LISTED.items():
        console.print(_table(kind, rows[title], with_tasks=kind == "role"))
        console.print()
    for line in unread:
        console.print(line)


def _row(entry: Registered) -> Row:
    try:
        find(entry.kind, entry.name)  # raises BrokenPlugin if two distributions register the name
        loaded = entry.load()
    except BrokenPlugin as error:
        return Row(entry.name, entry.origin, (), "", error.why)
    takes = [task.kind for task in loaded.takes] if isinstance(loaded, type) and issubclass(loaded, Role) else []
    summary = (inspect.getdoc(loaded) or "").partition("\n")[0]
    return Row(entry.name, entry.origin, tuple(takes), summary, None)


def _table(title: str, rows: list[Row], with_tasks: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(title, no_wrap=True)
    if with_tasks:
        table.add_column("takes")
    table.add_column("from")
    table.add_column("")
    for row in rows:
        description = f"broken: {row.fault}" if row.fault else row.summary
        takes = [", ".join(row.takes)] if with_tasks else []
        table.add_row(row.name, *takes, row.origin, description, style="red" if row.fault else None)
    return table


def _write(folder: Path, texts: Mapping[str, str]) -> None:
    """Write the files. Raise InputError if the folder is not empty or cannot be written."""
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty; give --dir a new or empty folder")
        for path, text in texts.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; give --dir another folder") from None


def _faults(what: str) -> list[str]:
    """Return what is wrong with the role that `what` names. Raise ConfigError if there is no such role."""
    try:
        if Path(what).suffix in (".yaml", ".yml"):
            return check_role(from_mapping(read_yaml(Path(what)), what))
        entry = _class_entry(what) if ":" in what else find("role", what)
        return check_role(entry.load_role()())
    except UnknownName as error:
        raise ConfigError(f"{error}. You can also give module:Class or a YAML file") from None
    except BrokenPlugin as error:
        if ":" in what and _is_absent(what, error.__cause__):
            raise ConfigError(f"there is no {what}: {error.why}") from None
        return [error.why]
    except SpecError as error:
        return str(error).removeprefix(f"{what}: ").split(f"\n{what}: ")


def _class_entry(target: str) -> Registered:
    """Return an entry for module:Class. The module may be in the working folder, so that a draft can be checked."""
    if not re.fullmatch(r"[\w.]+:[\w.]+", target):
        raise ConfigError(f"{target!r} must have the form module:Class")
    sys.path.insert(0, str(Path.cwd()))
    return Registered(target, "role", "the command line", target)


def _is_absent(target: str, cause: BaseException | None) -> bool:
    """Return True if an import failed because the module or class itself does not exist."""
    module, _, name = target.partition(":")
    match cause:
        case ModuleNotFoundError():
            return f"{module}.".startswith(f"{cause.name}.")
        case AttributeError():
            return cause.name == name and cause.obj is sys.modules.get(module)
        case _:
            return False
