"""Opens the tracing of a configuration, which may be off."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from runtime.config import Config
from runtime.events import Listener, ignore
from runtime.jobs.service import JobService


@dataclass(frozen=True)
class Tracing:
    """The tracing of a command.

    `on_event` is the listener that makes spans. While the context that `following` returns is entered, the traces of
    a service's jobs get their root spans. Without tracing, both do nothing.
    """

    on_event: Listener = ignore
    following: Callable[[JobService], AbstractAsyncContextManager[None]] = lambda jobs: nullcontext()


@asynccontextmanager
async def traced(config: Config, resumable: bool = False) -> AsyncIterator[Tracing]:
    """Export traces of jobs while the context is entered, if the configuration has `traces`.

    `resumable` says that a service works the jobs, whose ends `following` learns from the journal. Any other job ends
    with its only run. Leaving the context takes little more than export.SHUTDOWN_S at most. Raise ConfigError if
    OpenTelemetry refuses its settings.
    """
    if config.traces is None:
        yield Tracing()
        return
    # OpenTelemetry takes long to import, and is off by default.
    from runtime.tracing.export import SpanExport
    from runtime.tracing.job_spans import JobSpans
    from runtime.tracing.journal_roots import following

    async with SpanExport(config.traces, str(config.source)) as export:
        spans = JobSpans(export, config, resumable)
        yield Tracing(spans.on_event, partial(following, spans))
