"""`troupe serve`: run the team as a service."""

import gc
from functools import partial

import click

from runtime import config as configuration
from runtime import logs, run_folder
from runtime.assembly import start_team
from runtime.cli import interrupt
from runtime.cli.config_option import config_option
from runtime.cli.serve_report import Report
from runtime.cli.solve_screen import waiting_line
from runtime.config import Config, Mqtt
from runtime.engines.handle import EngineState
from runtime.errors import ConfigError
from runtime.events import EngineChanged, Event, NodesAwaited
from runtime.jobs.team import Team, assemble

MQTT_PORT = 1883


@click.command()
@config_option()
@click.option("--host", help="The address to listen on, instead of `service.host` (127.0.0.1 by default).")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="The port to listen on, instead of `service.port` (8000 by default). 0 picks a free port.",
)
@click.option("--mqtt", help="`embedded` to run a broker in this process for a first try, or the HOST[:PORT] of yours.")
@click.option("--json", "as_json", is_flag=True, help="Report progress as one JSON object per line.")
def serve(config: str, host: str | None, port: int | None, mqtt: str | None, as_json: bool) -> None:
    """Serve the team over HTTP (OpenAI's API, jobs, control, a live page) and, if configured, over MQTT.

    \b
    troupe serve
    curl localhost:8000/jobs -H 'content-type: application/json' -d '{"problem": "(12+7)*3-45"}'

    On SIGTERM or Ctrl-C, running jobs get `service.drain_s` seconds to finish. The next start resumes unfinished jobs.
    """
    chosen = _with_options(configuration.load(config), host, port, mqtt)
    team = assemble(chosen)
    stop = interrupt.Stop()
    interrupt.run(_serve(chosen, team, mqtt == "embedded", stop, as_json), stop)


def _with_options(config: Config, host: str | None, port: int | None, mqtt: str | None) -> Config:
    """Return the configuration with the command line's options in it. Raises ConfigError for an invalid --mqtt."""
    options = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    config = config.model_copy(update={"service": config.service.model_copy(update=options)})
    if mqtt is None or mqtt == "embedded":
        return config
    broker_host, _, broker_port = mqtt.rpartition(":") if ":" in mqtt else (mqtt, "", str(MQTT_PORT))
    if not broker_port.isdecimal() or not 0 < int(broker_port) < 65536:
        raise ConfigError(f"--mqtt: {mqtt!r} is not valid; give `embedded` or HOST[:PORT]")
    configured = config.mqtt or Mqtt()
    broker = configured.model_copy(update={"host": broker_host, "port": int(broker_port)})
    return config.model_copy(update={"mqtt": broker})


def _freeze_objects() -> None:
    """Keep the garbage collector from examining what exists now, which mostly lives as long as the service.

    vLLM's own server does the same. Otherwise a full collection stops all streams while it examines vLLM's modules.
    """
    gc.collect()
    gc.freeze()


async def _serve(config: Config, team: Team, embedded_broker: bool, stop: interrupt.Stop, as_json: bool) -> None:
    from runtime.api.serve import drain, serving  # takes long to import, and other commands do not need it

    report = Report(as_json)
    folder = run_folder.create()
    logs.log_to(folder)
    states: dict[str, EngineState] = {}

    def on_event(event: Event) -> None:
        if isinstance(event, EngineChanged):
            states[event.engine] = event.state
            report.update_spinner(", ".join(f"{name} {state}" for name, state in states.items()))
            if event.state in (EngineState.DEAD, EngineState.FAILED) or (as_json and event.state is EngineState.READY):
                text = f"[red]engine {event.engine} is {event.state}[/]"
                report.add("engine", text, engine=event.engine, state=event.state)
        elif isinstance(event, NodesAwaited):
            report.add("waiting", waiting_line(event), nodes=event.present, wanted=event.wanted)

    def on_listening(url: str) -> None:
        report.add("listening", f"listening on [bold]{url}[/] (logs: {folder})", url=url, logs=str(folder))
        report.start_spinner()

    def on_broker(text: str) -> None:
        report.add("broker", text, what=text)

    try:
        open_engines = partial(start_team, config, team, folder)
        async with serving(config, team, open_engines, on_listening, on_event, embedded_broker, on_broker) as backend:
            for seat in team.seats:
                await backend.seat_model(seat)  # so that no request has to wait for it
            _freeze_objects()
            report.stop_spinner()
            report.add("ready", "ready")
            stop.ready = True
            await stop.asked.wait()
            unfinished = await drain(backend, config.service.drain_s)
            text = f"{unfinished} jobs are unfinished; the next start resumes them" if unfinished else "all jobs ended"
            report.add("ending", text, jobs_left=unfinished)
    finally:
        report.stop_spinner()
