"""The live display of a run: its progress and, with `--watch`, a table of the engines."""

from collections.abc import Mapping

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from runtime.engines.handle import EngineHandle, EngineStats
from runtime.jobs.team import Team

MIB = 1 << 20
COLUMNS = ("engine", "roles", "state", "share", "KV cache", "running", "waiting", "tokens out")


def live(
    screen: Console, progress: RenderableType, engines: Mapping[str, EngineHandle], team: Team, watch: bool
) -> Live:
    """Return a display for the bottom of the screen: `progress` and, if `watch`, the engines in `engines` below it."""

    def render() -> RenderableType:
        return Group(progress, table(engines, team)) if watch and engines else progress

    return Live(get_renderable=render, console=screen, transient=True, refresh_per_second=10)


def table(engines: Mapping[str, EngineHandle], team: Team) -> Table:
    """Return a table of each engine's share of the device, used KV cache, running and waiting requests."""
    shown = Table(box=None, pad_edge=False, header_style="dim", caption="share: gpu_memory_utilization")
    shown.caption_justify = "left"
    for column in COLUMNS:
        shown.add_column(column, no_wrap=True)
    for name, engine in engines.items():
        roles = ", ".join(seat.name for seat in team.seats.values() if seat.engine == name)
        shown.add_row(name, roles, *_cells(engine.stats()))
    return shown


def _cells(stats: EngineStats) -> tuple[str, ...]:
    if stats.grant is None:
        return (stats.state, "", "", "", "", "")
    return (
        stats.state,
        f"{stats.grant.gpu_memory_utilization:.1%}",
        f"{stats.kv_cache_usage:.0%} of {stats.kv_cache_bytes / MIB:.0f} MiB",
        f"{stats.running} of {stats.grant.max_active_seqs}",
        str(stats.waiting),
        str(stats.completion_tokens),
    )
