"""Write the command reference and the configuration reference into the READMEs that hold them.

    python scripts/reference.py commands    # runtime/cli/README.md, from the click commands
    python scripts/reference.py config      # configs/README.md, from the pydantic models

Only the text between the two marker comments of a README is replaced; tests/test_reference.py checks that it is
current. The text does not depend on the terminal.
"""

import importlib
import inspect
import re
import sys
import tomllib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import starmap
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import click
from pydantic import BaseModel, ByteSize, SecretStr
from pydantic.fields import FieldInfo

from runtime.cli.main import cli
from runtime.config import (
    Cluster,
    Config,
    Control,
    Device,
    Member,
    Mqtt,
    PolicyChoice,
    Residency,
    ResidencyChoice,
    Service,
    Tool,
    Traces,
    WorkflowChoice,
)
from runtime.engines.spec import EngineSpec
from runtime.tools.mcp.settings import McpSettings

SECTIONS: Mapping[str, type[BaseModel]] = {
    "device": Device,
    "cluster": Cluster,
    "engines.<name>": EngineSpec,
    "team.<name>": Member,
    "workflow": WorkflowChoice,
    "tools.<name>": Tool,
    "tools.<name>.mcp": McpSettings,
    "control": Control,
    "control.policy": PolicyChoice,
    "residency": Residency,
    "residency.policy": ResidencyChoice,
    "service": Service,
    "mqtt": Mqtt,
    "traces": Traces,
}
TYPE_NAMES: Mapping[Any, str] = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    ByteSize: "size",
    SecretStr: "text",
    Any: "anything",
}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}


def commands() -> str:
    """Return a table of the commands, and the reference of each. The subcommands of a group follow it."""
    rows = [f"| `troupe {name}` | {_cell(_first_sentence(command))} |" for name, command in cli.commands.items()]
    details = _command(cli, click.Context(cli, info_name="troupe"))
    return _joined(["| Command | |", "|---|---|", *rows, *details])


def config() -> str:
    """Return the reference of every configuration key, and of the options of built-in workflows and policies."""
    lines = ["### The sections", *_keys(Config)]
    for place, model in SECTIONS.items():
        lines += ["", f"### `{place}`", "", *_paragraphs(model.__doc__ or ""), *_keys(model)]
        if model is WorkflowChoice:
            lines += _choices("workflow", "troupe.workflows")
        elif model is PolicyChoice:
            lines += _choices("policy", "troupe.policies")
        elif model is ResidencyChoice:
            lines += _choices("policy", "troupe.residency")
        elif model is Tool:
            lines += _choices("tool", "troupe.tools")
    return _joined(lines)


REFERENCES: Mapping[str, tuple[Path, Callable[[], str]]] = {
    "commands": (ROOT / "runtime" / "cli" / "README.md", commands),
    "config": (ROOT / "configs" / "README.md", config),
}


def updated(name: str) -> str:
    """Return the text of the README that holds a reference, with the current reference in it."""
    path, generate = REFERENCES[name]
    begin, end = f"<!-- begin: scripts/reference.py {name} -->\n", "<!-- end -->"
    head, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n{generate()}\n\n{end}{tail}"


def _joined(lines: Iterable[str]) -> str:
    """Return the lines as one text, with a single empty line wherever there are several."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    """Yield the lines of a command, and of its subcommands."""
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield from ["", f"### `{context.command_path}`", "", "```text", usage, "```", *_paragraphs(command.help or "")]
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    if options:
        yield from ["", "| Option | Default | Description |", "|---|---|---|"]
        yield from (_option(option, context) for option in options)
    for name, subcommand in getattr(command, "commands", {}).items():
        yield from _command(subcommand, click.Context(subcommand, info_name=name, parent=context))


def _first_sentence(command: click.Command) -> str:
    return command.get_short_help_str(limit=1000)


def _option(option: click.Option, context: click.Context) -> str:
    """Return the row of an option. click ends its help with `[default: 32; x>=1]`, or with one of the two."""
    names, text = option.get_help_record(context) or ("", "")
    extras = re.search(r"\s*\[([^\[\]]*)\]$", text)
    parts = extras[1].split("; ") if extras else []
    default = next((part.removeprefix("default: ") for part in parts if part.startswith("default: ")), "")
    bounds = "".join(f", {_code(part)}" for part in parts if not part.startswith("default: "))
    names = re.sub(r"(INTEGER|FLOAT) RANGE", r"\1", names)
    description = text[: extras.start()] if extras else text
    return f"| {_code(names)}{bounds} | {_code(default) if default else ''} | {_cell(description)} |"


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the lines of a docstring. A paragraph that click does not wrap (\\b) becomes a block of text."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if paragraph.startswith("\b"):
            yield from ["", "```text", paragraph.removeprefix("\b").strip("\n"), "```"]
        else:
            yield from ["", " ".join(paragraph.split())]


def _keys(model: type[BaseModel]) -> list[str]:
    rows = starmap(_key, model.model_fields.items())
    return ["", "| Key | Type | Default | Description |", "|---|---|---|---|", *rows]


def _key(name: str, field: FieldInfo) -> str:
    kind = _type(field.annotation) + _bounds(field)
    return f"| `{name}` | {kind} | {_default(field)} | {_cell(field.description or '')} |"


def _choices(kind: str, group: str) -> Iterator[str]:
    """Yield the options of every built-in workflow or policy that has options."""
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group]
    for name, target in entry_points.items():
        module, _, attribute = target.partition(":")
        options: type[BaseModel] = getattr(importlib.import_module(module), attribute).Options
        if options.model_fields:
            yield from ["", f"Options of the {kind} `{name}`:", *_missing_descriptions(options), *_keys(options)]


def _missing_descriptions(options: type[BaseModel]) -> Iterator[str]:
    """Yield the docstrings of options, inherited ones first, if not every option has a description."""
    if not all(field.description for field in options.model_fields.values()):
        for cls in reversed(options.__mro__):
            if cls.__name__ == options.__name__:
                yield from _paragraphs(cls.__doc__ or "")


def _type(annotation: Any) -> str:
    """Return the words for a type. An optional type reads like the type itself: its default is `none`."""
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if annotation in TYPE_NAMES:
        return TYPE_NAMES[annotation]
    arguments = [argument for argument in get_args(annotation) if argument is not types.NoneType]
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_type, arguments))
    if origin is Literal:
        *others, last = (f"`{argument}`" for argument in arguments)
        return f"{', '.join(others)} or {last}" if others else last
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        values = _type(arguments[1])
        return "a section for each name" if values == "section" else f"mapping of names to {values}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    raise TypeError(f"no words for the type {annotation!r}; add them to TYPE_NAMES")


def _bounds(field: FieldInfo) -> str:
    limits = {name: getattr(item, name) for item in field.metadata for name in BOUNDS if hasattr(item, name)}
    if {"ge", "le"} <= set(limits):
        return f", {_number(limits['ge'])} to {_number(limits['le'])}"
    return "".join(f", {words} {_number(limits[name])}" for name, words in BOUNDS.items() if name in limits)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


def _default(field: FieldInfo) -> str:
    """Return a default as YAML, or words if there is none."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{_size(value) if field.annotation is ByteSize else value}`"


def _size(count: int) -> str:
    return next((f"{count // size}{unit}" for unit, size in UNITS.items() if count % size == 0), str(count))


def _code(text: str) -> str:
    return f"`{_cell(text)}`"


def _cell(text: str) -> str:
    """Return text for one cell of a table: on one line, with its bars escaped."""
    return " ".join(text.split()).replace("|", "\\|")


def main(names: list[str]) -> None:
    """Write the references of these names."""
    if not names or not set(names) <= set(REFERENCES):
        raise SystemExit(f"usage: python scripts/reference.py {'|'.join(REFERENCES)}")
    for name in names:
        REFERENCES[name][0].write_text(updated(name), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
