"""The service: journal, HTTP, MQTT and engines of a configuration, brought up in this order and taken down in the
other."""

import asyncio
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from runtime import paths
from runtime.api.http import app as application
from runtime.api.http.auth import Tokens, guard
from runtime.api.http.backend import Backend
from runtime.api.http.metrics import Metrics
from runtime.api.monitor import Monitor
from runtime.api.mqtt import embedded_broker
from runtime.api.mqtt.client import MqttClient, begin_cursor
from runtime.assembly import Publish, RunningTeam
from runtime.config import Config, Mqtt, Service
from runtime.errors import TroupeError
from runtime.events import Listener, fan_out, ignore
from runtime.jobs.service import JobService
from runtime.jobs.team import Team

Announce = Callable[[str], None]
OpenTeam = Callable[[Listener, Publish], AbstractAsyncContextManager[RunningTeam]]
"""Brings engines up, which tell the listener and publish the controller's decisions."""
GRACE_S = 3
"""Seconds that open streams have to end when the service does."""


@asynccontextmanager
async def serving(
    config: Config,
    team: Team,
    open_team: OpenTeam,
    announce: Announce = lambda where: None,
    listener: Listener = ignore,
    with_broker: bool = False,
    tell: Callable[[str], None] = lambda what: None,
) -> AsyncIterator[Backend]:
    """A service that is up. Jobs are accepted, and health is answered, while its engines still start; `announce` is
    told where it listens as soon as it does, `tell` of the broker. Raises TroupeError where something cannot be had."""
    service = config.service
    gate = guard(service, Tokens(paths.tokens(service)))
    async with AsyncExitStack() as owned:
        jobs = await owned.enter_async_context(JobService(paths.journal(service), team, service))
        if with_broker or config.mqtt is not None:
            await begin_cursor(jobs.journal)
        metrics = Metrics()
        status = Monitor(lambda: {str(state): count for state, count in jobs.counts.items()})
        backend = Backend(config, team, jobs, status, metrics)
        listeners = fan_out(jobs.hear, status.hear, metrics.hear, listener)
        where = await owned.enter_async_context(_http(application.make(backend, gate, service), service))
        announce(where)
        mqtt = config.mqtt
        if with_broker:
            mqtt = await owned.enter_async_context(embedded_broker.broker(mqtt or Mqtt(), paths.home()))
        if mqtt is not None:
            bus = MqttClient(mqtt, team, jobs, status, lambda: backend.running, tell)
            await owned.enter_async_context(background(bus.run(), "mqtt"))
        running_team = await owned.enter_async_context(open_team(listeners, status.record))
        metrics.engines, metrics.controller = running_team.engines, running_team.controller
        backend.running_team = running_team
        jobs.use(running_team.orchestrator)
        try:
            yield backend
        finally:
            jobs.draining = True
            backend.running_team = None


@asynccontextmanager
async def background(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Work that goes on beside; ended with what it goes on beside."""
    task = asyncio.create_task(work, name=name)
    try:
        yield
    finally:
        while not task.done():  # again and again: a wait_for of Python 3.11 can swallow a cancellation
            task.cancel()
            await asyncio.wait([task], timeout=1)


@asynccontextmanager
async def _http(app: FastAPI, service: Service) -> AsyncIterator[str]:
    """The application on its port; where it is reached."""
    listening = _listen(service)
    host, port = listening.getsockname()[:2]
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            limit_concurrency=service.connections_max,
            timeout_graceful_shutdown=GRACE_S,
            h11_max_incomplete_event_size=64 << 10,
            server_header=False,
            # uvicorn's default believes localhost, where any client could name a new address at every request.
            forwarded_allow_ips=os.environ.get("FORWARDED_ALLOW_IPS", ""),
            ws="none",
        )
    )
    task = asyncio.create_task(server.serve(sockets=[listening]), name="http")
    try:
        while not server.started and not task.done():  # noqa: ASYNC110  uvicorn has no event for it
            await asyncio.sleep(0.005)
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        server.should_exit = True
        await asyncio.wait([task])
        listening.close()


def _listen(service: Service) -> socket.socket:
    family = socket.AF_INET6 if ":" in service.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((service.host, service.port))
    except OSError as error:
        listening.close()
        remedy = "; give another with --port" if error.errno == errno.EADDRINUSE else ""
        raise TroupeError(f"service.port: {service.host}:{service.port}: {error.strerror}{remedy}") from None
    listening.setblocking(False)
    return listening


class _Server(uvicorn.Server):
    """Signals are the command's business."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def drain(backend: Backend, seconds: float) -> int:
    """Take no more, and let what runs end within a time; how many jobs are left to the next start."""
    left = await backend.jobs.drain(seconds)
    logging.getLogger(__name__).info("%d jobs are left to the next start", left)
    return left
