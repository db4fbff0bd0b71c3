"""The screen of `troupe solve`: its console, and the lines of text (rich markup) for engines, steps and results."""

from rich.console import Console
from rich.markup import escape

from agents.workflow import Entry
from runtime.engines.handle import EngineState
from runtime.events import EngineChanged, NodesAwaited
from runtime.jobs.batch import Summary
from runtime.jobs.job import JobResult


def output_console(screen: Console) -> Console:
    """Return the console for results, which writes to standard output.

    If standard output and `screen` (standard error) are both terminals, return `screen`, which prints above its
    progress bar and not over it.
    """
    output = Console(highlight=False)
    return screen if output.is_terminal and screen.is_terminal else output


class EngineProgress:
    """A description of a team's progress: starting, working or closing."""

    def __init__(self) -> None:
        self._states: dict[str, EngineState] = {}

    def update(self, event: EngineChanged | NodesAwaited) -> str:
        """Note an engine's new state or what the team waits for, and return what it is doing."""
        if isinstance(event, NodesAwaited):
            return waiting_line(event)
        self._states[event.engine] = event.state
        if event.state is EngineState.CLOSED:
            return "closing the engines"
        if all(state is EngineState.READY for state in self._states.values()):
            return "solving"
        return ", ".join(f"{name} {state}" for name, state in self._states.items())


def waiting_line(event: NodesAwaited) -> str:
    """Return what the team waits for."""
    return f"waiting for nodes: {event.present} of {event.wanted} are there"


def entry_line(entry: Entry) -> str:
    """Return a step or verdict of the transcript."""
    mark = {"accepted": "[green]✓[/]", "rejected": "[red]✗[/]", "failed": "[red]✗[/]"}.get(str(entry.verdict), " ")
    note = f"  [yellow]({escape(entry.note)})[/]" if entry.note else ""
    return f"{mark} [cyan]{escape(f'{entry.seat:<10}')}[/] {escape(entry.input)}  →  {escape(entry.output)}{note}"


def answer_line(result: JobResult) -> str:
    """Return the answer to a single problem."""
    doubt = "  [yellow](not confirmed by the critic)[/]" if result.confirmed is False else ""
    return f"[bold]answer: {escape(str(result.answer))}[/]{doubt}"


def result_line(result: JobResult) -> str:
    """Return one result of a file of problems."""
    mark = {True: "[green]✓[/]", False: "[red]✗[/]", None: " "}[result.correct]
    expected = f"  (expected {result.expected})" if result.correct is False else ""
    doubt = "  [yellow](not confirmed)[/]" if result.confirmed is False else ""
    answer = f"[bold]{escape(str(result.answer))}[/]{expected}{doubt}"
    return f"{mark} [cyan]{escape(result.id)}[/]  {escape(result.problem)}  →  {answer}"


def summary_lines(summary: Summary) -> str:
    """Return counts, accuracy, job times, tokens and, if the device has a price, the cost."""
    accuracy = "" if summary.accuracy is None else f", {summary.accuracy:.1%} right"
    costs = [used.cost for used in summary.usage.values() if used.cost is not None]
    cost = f"; cost {sum(costs):.6f}" if costs else ""
    tokens = ", ".join(f"{seat} {used.prompt_tokens}+{used.completion_tokens}" for seat, used in summary.usage.items())
    return (
        f"{summary.problems} problems, {summary.failed} failed, {summary.unconfirmed} not confirmed{accuracy}\n"
        f"job time p50 {summary.job_time_p50_s:.2f} s, p90 {summary.job_time_p90_s:.2f} s, "
        f"p99 {summary.job_time_p99_s:.2f} s; tokens in+out: {tokens or 'none'}{cost}"
    )
