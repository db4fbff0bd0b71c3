"""The command `troupe`: joins the subcommands, and turns errors and signals into exit codes.

Exit codes: 0 success; 1 some problems failed; 2 wrong usage or configuration; 130 ended by Ctrl-C, 143 by SIGTERM.
"""

import sys
from importlib.metadata import PackageNotFoundError, version

import click

from runtime.cli.bench import bench
from runtime.cli.config import config
from runtime.cli.doctor import doctor
from runtime.cli.engines import engines
from runtime.cli.interrupt import Interrupted
from runtime.cli.jobs import jobs
from runtime.cli.replay import replay
from runtime.cli.roles import roles
from runtime.cli.serve import serve
from runtime.cli.simulate import simulate
from runtime.cli.solve import solve
from runtime.cli.tokens import tokens
from runtime.cli.topics import topics
from runtime.errors import TroupeError


def _version() -> str:
    try:
        return version("troupe-llm")
    except PackageNotFoundError:
        return "from a checkout"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="troupe")
def cli() -> None:
    """Run a team of language models that solve problems together, on vLLM engines that share a GPU or CPU.

    \b
    troupe solve "(12+7)*3-45"
    troupe serve
    troupe doctor
    """


for command in (solve, serve, engines, jobs, tokens, topics, bench, simulate, replay, roles, config, doctor):
    cli.add_command(command)


def main() -> None:
    """Run the command line and exit. Print a TroupeError without a traceback."""
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except Interrupted as interruption:
        click.echo("interrupted", err=True)
        code = 128 + interruption.number
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except TroupeError as error:
        click.echo(f"troupe: {error}", err=True)
        code = 2
    except BrokenPipeError:  # the program that reads our output has ended
        sys.stderr.close()
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
