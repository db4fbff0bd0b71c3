"""`troupe tokens`: manage the tokens that a service accepts."""

import click

from runtime import config as configuration
from runtime import paths
from runtime.api.auth import Scope, Tokens
from runtime.cli.config_option import config_option

_config = config_option()


@click.group()
def tokens() -> None:
    """Add, list and remove the tokens of `troupe serve`.

    Once a token exists, every request needs one, except for /health, /ready, /openapi.json and the files of the live
    page.
    """


@tokens.command()
@click.argument("name")
@click.option(
    "--may",
    multiple=True,
    type=click.Choice([str(scope) for scope in Scope]),
    default=("read", "submit"),
    show_default=True,
    help="A scope: `read` reads state and results, `submit` submits jobs and requests, `control` controls engines and"
    " policies. Repeat the option for several scopes.",
)
@_config
def add(name: str, may: tuple[str, ...], config: str) -> None:
    """Create a token and print it. It cannot be shown again, because only its hash is stored."""
    click.echo(_tokens(config).add(name, tuple(Scope(scope) for scope in may)))


@tokens.command("list")
@_config
def list_(config: str) -> None:
    """List the names and scopes of all tokens."""
    for token in _tokens(config).all:
        click.echo(f"{token.name}  {', '.join(token.scopes)}")


@tokens.command()
@click.argument("name")
@_config
def remove(name: str, config: str) -> None:
    """Remove a token. A running service rejects it from then on."""
    tokens = _tokens(config)
    tokens.remove(name)
    if not tokens.all:
        click.echo(
            "This was the last token. A service that listens beyond localhost rejects every request until you add one."
            " A service on localhost that has seen a token rejects every request until you add one or restart it."
            " With `open: true`, a service accepts every request.",
            err=True,
        )


def _tokens(config: str) -> Tokens:
    return Tokens(paths.tokens(configuration.load(config).service))
