"""`troupe tokens`: who may do what with the service."""

import click

from runtime import config as configuration
from runtime import paths
from runtime.api.auth import Scope, Tokens

_config = click.option(
    "--config", "-c", default=configuration.DEFAULT, show_default=True, help="Whose tokens: a file, or a shipped name."
)


@click.group()
def tokens() -> None:
    """Add, list and remove the tokens of `troupe serve`. With the first, everything needs one."""


@tokens.command()
@click.argument("name")
@click.option(
    "--may",
    multiple=True,
    type=click.Choice([str(scope) for scope in Scope]),
    default=("read", "submit"),
    show_default=True,
    help="What it may: read what is there; submit jobs and requests; control engines and policies. Repeat it.",
)
@_config
def add(name: str, may: tuple[str, ...], config: str) -> None:
    """Make a token. It is printed once, and kept only as a hash."""
    click.echo(_tokens(config).add(name, tuple(Scope(scope) for scope in may)))


@tokens.command("list")
@_config
def list_(config: str) -> None:
    """The names of all tokens, and what each may."""
    for token in _tokens(config).all:
        click.echo(f"{token.name}  {', '.join(token.scopes)}")


@tokens.command()
@click.argument("name")
@_config
def remove(name: str, config: str) -> None:
    """Take a token away; a service that runs refuses it from now on."""
    tokens = _tokens(config)
    tokens.remove(name)
    if not tokens.all:
        click.echo(
            "That was the last token. A service that listens beyond localhost refuses every request until you add one;"
            " on localhost, a service that has seen a token refuses until then, or until it is restarted. With `open:"
            " true` a service admits everybody.",
            err=True,
        )


def _tokens(config: str) -> Tokens:
    return Tokens(paths.tokens(configuration.load(config).service))
