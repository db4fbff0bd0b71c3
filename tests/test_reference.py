"""The generated references are current; every configuration key and every option of a command has a description."""

from collections.abc import Iterator

import click
import pytest
from pydantic import BaseModel

from runtime.cli.main import cli
from runtime.config import Config
from scripts import reference


@pytest.mark.parametrize("name", reference.REFERENCES)
def test_the_reference_is_current(name: str) -> None:
    text = reference.REFERENCES[name][0].read_text()
    assert text == reference.updated(name), f"run: python scripts/reference.py {name}"


@pytest.mark.parametrize("name", reference.REFERENCES)
def test_the_reference_does_not_depend_on_the_terminal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = reference.updated(name)
    monkeypatch.setenv("COLUMNS", "40")
    assert reference.updated(name) == wide


@pytest.mark.parametrize(("place", "model"), [("the configuration", Config), *reference.SECTIONS.items()])
def test_every_key_has_a_description(place: str, model: type[BaseModel]) -> None:
    missing = [key for key, field in model.model_fields.items() if not field.description]
    assert missing == [], place


def options(command: click.Command, path: str) -> Iterator[tuple[str, click.Option]]:
    """Yield every option of a command and of its subcommands, with the command that it belongs to."""
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield path, parameter
    for name, subcommand in getattr(command, "commands", {}).items():
        yield from options(subcommand, f"{path} {name}")


def test_every_option_has_help() -> None:
    assert [f"{path} {option.opts[0]}" for path, option in options(cli, "troupe") if not option.help] == []


def test_every_section_is_in_the_reference() -> None:
    sections = {place.partition(".")[0] for place in reference.SECTIONS}
    assert sections == set(Config.model_fields) - {"judge", "devices"}  # which are values, not sections
