"""Services in processes of their own, for measurements and fault drills, and the requests that both send to them.

    python scripts/service_harness.py FOLDER WORKFLOW MQTT_PORT TIME_SCALE

runs a service over modelled engines, with its journal in FOLDER, until it is killed. It prints its address first.
MQTT_PORT 0 means no MQTT, and TIME_SCALE 0 means engines that reply at once.
"""

import argparse
import asyncio
import json
import os
import resource
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime import config
from runtime.api.mqtt.messages import Topics
from runtime.api.serve import serving
from runtime.config import Config, Mqtt
from runtime.jobs.team import assemble
from runtime.simulation.assembly import start_modelled_team

PROBLEM = "(12+7)*3-(45-5)"
TOPICS = Topics("main")

Measure = Callable[[argparse.Namespace], Coroutine[Any, Any, Any]]


class Service:
    """A service over modelled engines in a process of its own. An async context manager, which kills it at the end.

    `url` is its address. `time_scale` multiplies the modelled durations of the engines.
    """

    def __init__(
        self, folder: Path, workflow: str = "deliberate", *, mqtt_port: int = 0, time_scale: float = 0
    ) -> None:
        self._arguments = (str(folder), workflow, str(mqtt_port), str(time_scale))
        self._process: asyncio.subprocess.Process
        self.url = ""

    async def __aenter__(self) -> "Service":
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, *self._arguments, stdout=asyncio.subprocess.PIPE
        )
        assert self._process.stdout is not None
        self.url = (await self._process.stdout.readline()).decode().strip()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.kill()
        await self._process.wait()

    def kill(self) -> None:
        """Send SIGKILL if the process is still alive."""
        if self._process.returncode is None:
            self._process.kill()

    def resident_mib(self) -> float:
        """Return the resident memory of the process, in MiB."""
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize() / (1 << 20)


@asynccontextmanager
async def modelled_service(
    folder: Path, workflow: str = "deliberate", *, mqtt_port: int = 0, time_scale: float = 0
) -> AsyncIterator[tuple[Service, aiohttp.ClientSession]]:
    """Start a service over modelled engines. Yield it and an HTTP session for it, once it is ready."""
    async with (
        Service(folder, workflow, mqtt_port=mqtt_port, time_scale=time_scale) as service,
        aiohttp.ClientSession(service.url) as http,
    ):
        await _wait_until_ready(http)
        yield service, http


@asynccontextmanager
async def troupe_server(folder: Path, workflow: str) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """Start `troupe serve` with the real engines that a workflow needs. Yield its address and process once it is ready.

    The workflow `solo` needs the solver's engine only.
    """
    (folder / "team.yaml").write_text(f"extends: embedded\nworkflow: {{name: {workflow}}}\n")
    command = (sys.executable, "-m", "runtime.cli.main", "serve", "--json", "--port", "0", "-c", folder / "team.yaml")
    environment = {**os.environ, "TROUPE_HOME": str(folder / "home")}
    async with running(*command, cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE) as process:
        assert process.stdout is not None
        url = ""
        async for line in process.stdout:
            event = json.loads(line)
            url = event.get("url", url)
            if event["event"] == "ready":
                break
        yield url, process


@asynccontextmanager
async def running(*command: object, **options: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """Start a process, and terminate it at the end."""
    process = await asyncio.create_subprocess_exec(*map(str, command), **options)
    try:
        yield process
    finally:
        process.terminate()
        await process.wait()


async def submit(http: aiohttp.ClientSession, **job: Any) -> str | None:
    """Submit a job. Return its id, or None if the service refuses it."""
    async with http.post("/jobs", json={"problem": PROBLEM, **job}) as answer:
        id: str | None = (await answer.json())["id"] if answer.status == 202 else None
        return id


async def ended_jobs(http: aiohttp.ClientSession, **parameters: int) -> AsyncGenerator[str, None]:
    """Yield the id of each job that is done, from the endless stream of all events."""
    async with http.get("/events", params=parameters, timeout=aiohttp.ClientTimeout(None)) as answer:
        async for line in answer.content:
            if line.startswith(b"data: ") and (event := json.loads(line[6:]))["kind"] == "done":
                yield event["job"]


def run_measure(measures: Mapping[str, Measure], parser: argparse.ArgumentParser) -> None:
    """Run the measure that the command line names, with the parser's options, and print its result as JSON."""
    parser.add_argument("what", choices=list(measures))
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(measures[options.what](options)), indent=1))


async def _wait_until_ready(http: aiohttp.ClientSession) -> None:
    for _ in range(600):
        async with http.get("/ready") as answer:
            if answer.status == 200:
                return
        await asyncio.sleep(0.1)
    raise TimeoutError("the service is not ready after a minute")


def _configuration(folder: Path, workflow: str, mqtt: Mqtt | None) -> Config:
    """Return the embedded team's configuration, with the service's files in a folder and on a free port."""
    embedded = config.load("embedded").with_workflow(workflow)
    changes = {
        "port": 0,
        "journal": str(folder / "jobs.db"),
        "tokens": str(folder / "tokens.json"),
        "queue_max": 1_000_000,
    }
    return embedded.model_copy(update={"service": embedded.service.model_copy(update=changes), "mqtt": mqtt})


async def _serve(folder: Path, workflow: str, mqtt_port: int, time_scale: float) -> None:
    """Serve modelled engines, and print the address."""
    chosen = _configuration(folder, workflow, Mqtt(port=mqtt_port) if mqtt_port else None)
    team = assemble(chosen)
    open_team = partial(start_modelled_team, chosen, team, time_scale=time_scale)
    async with serving(chosen, team, open_team, partial(print, flush=True)):
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("workflow")
    parser.add_argument("mqtt_port", type=int)
    parser.add_argument("time_scale", type=float)
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(options.folder, options.workflow, options.mqtt_port, options.time_scale))


if __name__ == "__main__":
    main()
