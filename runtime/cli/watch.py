"""The live display of a run: its progress and, with `--watch`, tables of the engines."""

from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from runtime.assembly import RunningTeam
from runtime.cli import measured
from runtime.control.snapshot import DeviceMoment
from runtime.engines.handle import EngineStats
from runtime.engines.replicas import engine_of

MIB = 1 << 20
COLUMNS = ("engine", "roles", "state", "share", "KV cache", "running", "waiting", "tokens out")


def live(
    screen: Console, progress: RenderableType, running_team: Callable[[], RunningTeam | None], watch: bool
) -> Live:
    """Return a display for the bottom of the screen: `progress` and, if `watch`, the team's engines below it."""

    def render() -> RenderableType:
        running = running_team()
        return Group(progress, tables(running)) if watch and running else progress

    return Live(get_renderable=render, console=screen, transient=True, refresh_per_second=10)


def tables(running: RunningTeam) -> Group:
    """Return tables of the engines: their shares and requests, and what their steps cost."""
    snapshots = running.controllers.snapshots
    costs = {view.name: (view.cost, view.utilization) for each in snapshots.values() for view in each.views}
    devices = {name: DeviceMoment.of(snapshot) for name, snapshot in snapshots.items()}
    return Group(_table(running), measured.table(costs, devices))


def _table(running: RunningTeam) -> Table:
    """Return a table of each engine's share of the device, used KV cache, running and waiting requests."""
    views = {view.name: view for each in running.controllers.snapshots.values() for view in each.views}
    shown = Table(box=None, pad_edge=False, header_style="dim", caption="share: gpu_memory_utilization")
    shown.caption_justify = "left"
    for column in COLUMNS:
        shown.add_column(column, no_wrap=True)
    for name, engine in running.engines.items():
        roles = ", ".join(seat.name for seat in running.team.seats.values() if seat.engine == engine_of(name))
        view = views.get(name)
        shown.add_row(name, roles, *_cells(engine.stats(), view.paused_s if view else 0.0))
    return shown


def _cells(stats: EngineStats, paused_s: float) -> tuple[str, ...]:
    if stats.grant is None:
        return (stats.state, "", "", "", "", "")
    most = measured.concurrency(stats.grant.max_active_seqs, paused_s)
    return (
        stats.state,
        f"{stats.grant.gpu_memory_utilization:.1%}",
        f"{stats.kv_cache_usage:.0%} of {stats.kv_cache_bytes / MIB:.0f} MiB",
        f"{stats.running} of {most}" if stats.grant.max_active_seqs else f"{stats.running}, {most}",
        str(stats.waiting),
        str(stats.completion_tokens),
    )
