"""`troupe topics`: what is said over MQTT."""

import json

import click
from rich.console import Console
from rich.table import Table

from runtime import config as configuration
from runtime.api.mqtt.messages import reference


@click.command()
@click.option("--config", "-c", default=configuration.DEFAULT, show_default=True, help="A file, or a shipped name.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, with the JSON schema of every payload.")
def topics(config: str, as_json: bool) -> None:
    """Every MQTT topic of a service: what comes in and goes out, and what it carries. All payloads are JSON objects."""
    mqtt = configuration.load(config).mqtt
    rows = reference(mqtt.cluster if mqtt else "main")
    if as_json:
        described = {
            row.topic: {
                "direction": "in" if row.comes_in else "out",
                "qos": row.qos,
                "retained": row.retained,
                "says": row.says,
                "schema": row.payload.json_schema(),
            }
            for row in rows
        }
        click.echo(json.dumps(described, indent=1))
        return
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("topic", "", "QoS", "retained", ""):
        shown.add_column(title, no_wrap=title == "topic")
    for row in rows:
        direction = "in" if row.comes_in else "out"
        shown.add_row(row.topic, direction, str(row.qos), "yes" if row.retained else "", row.says)
    Console(highlight=False).print(shown)
