"""The service: starts the journal, HTTP, MQTT and the engines of a configuration, and stops them in reverse order."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

from runtime import paths
from runtime.api.auth import Tokens
from runtime.api.http import app as http_app
from runtime.api.http.auth import gate_for
from runtime.api.http.backend import Backend
from runtime.api.http.metrics import Metrics
from runtime.api.http.server import listening
from runtime.api.monitor import Monitor
from runtime.api.mqtt import embedded_broker
from runtime.api.mqtt.client import MqttClient
from runtime.api.mqtt.job_events import begin_cursor
from runtime.assembly import RunningTeam
from runtime.config import Config, Mqtt
from runtime.devices.handle import Publish
from runtime.events import Listener, fan_out, ignore
from runtime.jobs.service import JobService
from runtime.jobs.team import Team
from runtime.tracing.traced import traced

OpenTeam = Callable[[Listener, Publish], AbstractAsyncContextManager[RunningTeam]]
"""Starts the engines. They report events to the listener; the controller publishes its decisions."""


@asynccontextmanager
async def serving(
    config: Config,
    team: Team,
    open_team: OpenTeam,
    announce: Callable[[str], None] = lambda url: None,
    listener: Listener = ignore,
    with_broker: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> AsyncIterator[Backend]:
    """Run a service; enter the context once its engines are ready.

    The service already accepts jobs and answers `/health` while its engines start. `announce` receives its URL as soon
    as it listens. `tell` receives a text whenever the connection to the MQTT broker changes. `with_broker` starts the
    embedded broker. Raises TroupeError if a part of the service cannot start.
    """
    service = config.service
    gate = gate_for(service, Tokens(paths.tokens(service)))
    async with AsyncExitStack() as owned:
        tracing = await owned.enter_async_context(traced(config, resumable=True))
        jobs = await owned.enter_async_context(JobService(paths.journal(service), team, service))
        await owned.enter_async_context(tracing.following(jobs))
        if with_broker or config.mqtt is not None:
            await begin_cursor(jobs.journal)
        metrics = Metrics()
        monitor = Monitor(lambda: {str(state): count for state, count in jobs.counts.items()})
        backend = Backend(config, team, jobs, monitor, metrics)
        listeners = fan_out(jobs.on_event, monitor.on_event, metrics.on_event, tracing.on_event, listener)
        url = await owned.enter_async_context(listening(http_app.create_app(backend, gate, service), service))
        announce(url)
        mqtt = config.mqtt
        if with_broker:
            mqtt = await owned.enter_async_context(embedded_broker.broker(mqtt or Mqtt(), paths.home()))
        if mqtt is not None:
            client = MqttClient(mqtt, team, jobs, monitor, backend.ready_team, tell, not with_broker)
            await owned.enter_async_context(background(client.run(), "mqtt"))
        running_team = await owned.enter_async_context(open_team(listeners, monitor.record))
        metrics.engines, metrics.controllers = running_team.engines, running_team.controllers
        backend.running_team = running_team
        jobs.use(running_team.orchestrator, running_team.expect_job)
        try:
            yield backend
        finally:
            backend.running_team = None
            await jobs.stop()


@asynccontextmanager
async def background(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Run a coroutine in a task of this name; cancel the task on leaving and wait until it has ended."""
    task = asyncio.create_task(work, name=name)
    try:
        yield
    finally:
        while not task.done():  # cancel repeatedly, because Python 3.11's wait_for can swallow a cancellation
            task.cancel()
            await asyncio.wait([task], timeout=1)


async def drain(backend: Backend, seconds: float) -> int:
    """Stop accepting and starting jobs; wait up to `seconds` for running jobs to finish.

    Returns the number of unfinished jobs. The next start resumes them.
    """
    unfinished = await backend.jobs.drain(seconds)
    logging.getLogger(__name__).info("%d jobs are unfinished; the next start resumes them", unfinished)
    return unfinished
