"""`troupe doctor`: check this machine and print the findings.

Exit codes: 0 if Troupe can run here, with or without warnings; 2 if a fault must be fixed first.
"""

import json
import sys
from dataclasses import asdict

import click
from rich.console import Console
from rich.table import Table

from runtime import paths
from runtime.config import SHIPPED
from runtime.doctor import Finding, Severity, examine, observe

PIPE_WIDTH_CHARACTERS = 300
"""The width of output that is not a terminal: wide enough that no line is cut."""
STYLES = {Severity.OK: "green", Severity.WARNING: "yellow", Severity.FAULT: "red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Check this machine, and say how to fix what is wrong.

    The exit code is 0 if Troupe can run here, and 2 if a fault must be fixed first.
    """
    findings = examine(observe(paths.runs(), SHIPPED / "models"))
    if as_json:
        _print_json(findings)
    else:
        _print_table(findings)
    context.exit(2 if any(finding.severity is Severity.FAULT for finding in findings) else 0)


def _print_json(findings: list[Finding]) -> None:
    click.echo(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))


def _print_table(findings: list[Finding]) -> None:
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH_CHARACTERS)
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        table.add_row(finding.severity, finding.name, finding.detail, style=STYLES[finding.severity])
        if finding.mend:
            table.add_row("", "", f"to fix it: {finding.mend}")
    console.print(table)
    faults = sum(finding.severity is Severity.FAULT for finding in findings)
    console.print("Troupe can run here." if not faults else f"Troupe cannot run here yet; faults to fix: {faults}.")
