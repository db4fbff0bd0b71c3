"""Reports the state of `troupe serve` while it runs, as lines and a spinner on stderr or as JSON objects on stdout.

The service does not depend on its terminal. If a report cannot be written, because the disk is full or the terminal is
closed, it is lost.
"""

import json
from contextlib import suppress

import click
from rich.console import Console
from rich.status import Status as Spinner


class _Screen(Console):
    """A console on stderr that falls silent when the other end of its pipe is closed. rich would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Report:
    """The report of a service, which never raises OSError. `as_json` chooses JSON objects instead of lines."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._screen = _Screen(stderr=True, highlight=False)
        self._spinner = Spinner("starting", console=self._screen)

    def add(self, event: str, text: str, **details: object) -> None:
        """Report an event: `text`, which may hold rich's markup, or the `details` as JSON."""
        with suppress(OSError):
            if self.as_json:
                click.echo(json.dumps({"event": event, **details}))
            else:
                self._screen.print(text, soft_wrap=True)

    def start_spinner(self) -> None:
        """Show the spinner until `stop_spinner` is called."""
        with suppress(OSError):
            self._spinner.start()

    def update_spinner(self, text: str) -> None:
        """Show a text beside the spinner."""
        self._spinner.update(text)

    def stop_spinner(self) -> None:
        """Remove the spinner if it is shown."""
        with suppress(OSError):
            self._spinner.stop()
