"""The engines as they are at this moment: a table for the screen."""

from collections.abc import Mapping

from rich.table import Table

from runtime.engines.handle import EngineHandle, EngineStats
from runtime.jobs.team import Team

MIB = 1 << 20
COLUMNS = ("engine", "roles", "state", "share", "KV cache", "running", "waiting", "tokens out")


def table(engines: Mapping[str, EngineHandle], team: Team) -> Table:
    """Each engine's share of the device, KV cache in use, concurrency and queue."""
    shown = Table(box=None, pad_edge=False, header_style="dim", caption="share: gpu_memory_utilization")
    shown.caption_justify = "left"
    for column in COLUMNS:
        shown.add_column(column, no_wrap=True)
    for name, engine in engines.items():
        roles = ", ".join(seat.name for seat in team.seats.values() if seat.engine == name)
        shown.add_row(name, roles, *_row(engine.stats()))
    return shown


def _row(stats: EngineStats) -> tuple[str, ...]:
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
