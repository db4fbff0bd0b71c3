"""The option `--config`, which most commands share."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from runtime import config as configuration

F = TypeVar("F", bound=Callable[..., Any])


def config_option(default: str = configuration.DEFAULT) -> Callable[[F], F]:
    """Return a decorator that adds `--config` to a command. The command's parameter is `config`."""
    text = "A configuration file, or the name of a shipped one."
    return click.option("--config", "-c", default=default, show_default=True, help=text)
