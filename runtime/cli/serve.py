"""`troupe serve`: the team as a service."""

import json
from functools import partial

import click
from rich.console import Console
from rich.status import Status as Spinner

from runtime import config as configuration
from runtime import logs, run_folder
from runtime.assembly import start_team
from runtime.cli import interrupt
from runtime.config import Config, Mqtt
from runtime.engines.handle import EngineState
from runtime.errors import ConfigError
from runtime.events import EngineChanged, Event
from runtime.jobs.team import Team, assemble


@click.command()
@click.option("--config", "-c", default=configuration.DEFAULT, show_default=True, help="A file, or a shipped name.")
@click.option("--host", help="Listen on this address instead of the configured one (127.0.0.1).")
@click.option("--port", type=click.IntRange(0, 65535), help="Listen on this port instead of the configured one (8000).")
@click.option("--mqtt", help="`embedded` for a broker in this process, for a first try; or HOST[:PORT] of another.")
@click.option("--json", "as_json", is_flag=True, help="Say what happens as a line of JSON each.")
def serve(config: str, host: str | None, port: int | None, mqtt: str | None, as_json: bool) -> None:
    """Serve the team by HTTP (OpenAI's API, jobs, control, a live page) and, where configured, by MQTT.

    \b
    troupe serve
    curl localhost:8000/jobs -H 'content-type: application/json' -d '{"problem": "(12+7)*3-45"}'

    SIGTERM and Ctrl-C let what runs come to its end; jobs that are left go on with the next start.
    """
    chosen = _chosen(configuration.load(config), host, port, mqtt)
    team = assemble(chosen)
    stop = interrupt.Stop()
    interrupt.run(_serve(chosen, team, mqtt == "embedded", stop, as_json), stop)


def _chosen(config: Config, host: str | None, port: int | None, mqtt: str | None) -> Config:
    """The configuration with what the command line says instead."""
    given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    config = config.model_copy(update={"service": config.service.model_copy(update=given)})
    if mqtt is not None and mqtt != "embedded":
        name, _, number = mqtt.rpartition(":") if ":" in mqtt else (mqtt, "", "1883")
        if not number.isdecimal() or not 0 < int(number) < 65536:
            raise ConfigError(f"--mqtt: {mqtt!r} is neither `embedded` nor HOST[:PORT]")
        known = config.mqtt or Mqtt()
        config = config.model_copy(update={"mqtt": known.model_copy(update={"host": name, "port": int(number)})})
    return config


async def _serve(config: Config, team: Team, embedded: bool, stop: interrupt.Stop, as_json: bool) -> None:
    from runtime.api.serve import drain, serving

    screen = Console(stderr=True, highlight=False)
    folder = run_folder.create()
    logs.log_to(folder)
    spinner = Spinner("starting", console=screen)
    states: dict[str, EngineState] = {}

    def say(event: str, text: str, **figures: object) -> None:
        if as_json:
            click.echo(json.dumps({"event": event, **figures}))
        else:
            screen.print(text, soft_wrap=True)

    def show(event: Event) -> None:
        if isinstance(event, EngineChanged):
            states[event.engine] = event.state
            spinner.update(", ".join(f"{name} {state}" for name, state in states.items()))
            if event.state in (EngineState.DEAD, EngineState.FAILED) or (as_json and event.state is EngineState.READY):
                say("engine", f"[red]engine {event.engine} {event.state}[/]", engine=event.engine, state=event.state)

    def announce(where: str) -> None:
        say("listening", f"listening on [bold]{where}[/] (logs: {folder})", url=where, logs=str(folder))
        spinner.start()

    def tell(what: str) -> None:
        say("broker", what, what=what)

    try:
        open_engines = partial(start_team, config, team, folder)
        async with serving(config, team, open_engines, announce, show, embedded, tell) as backend:
            spinner.stop()
            say("ready", "ready")
            stop.ready = True
            await stop.asked.wait()
            left = await drain(backend, config.service.drain_s)
            say("ending", f"{left} jobs are left to the next start" if left else "all jobs have ended", jobs_left=left)
    finally:
        spinner.stop()
