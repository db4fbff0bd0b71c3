"""`troupe topics`: the documentation of the MQTT topics."""

import json
from collections.abc import Sequence

import click
from rich.console import Console
from rich.table import Table

from runtime import config as configuration
from runtime.api.mqtt.messages import TopicInfo, reference
from runtime.cli.config_option import config_option


@click.command()
@config_option()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the JSON schema of every payload.")
def topics(config: str, as_json: bool) -> None:
    """List the MQTT topics of the service: direction, QoS and payload. All payloads are JSON objects.

    \b
    troupe topics
    troupe topics --json
    """
    mqtt = configuration.load(config).mqtt
    rows = reference(mqtt.cluster if mqtt else "main")
    if as_json:
        click.echo(json.dumps({row.topic: _described(row) for row in rows}, indent=1))
    else:
        Console(highlight=False).print(_table(rows))


def _described(row: TopicInfo) -> dict[str, object]:
    return {
        "direction": _direction(row),
        "qos": row.qos,
        "retained": row.retained,
        "says": row.description,
        "schema": row.payload.json_schema(),
    }


def _table(rows: Sequence[TopicInfo]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("topic", "", "QoS", "retained", ""):
        table.add_column(title, no_wrap=title == "topic")
    for row in rows:
        table.add_row(row.topic, _direction(row), str(row.qos), "yes" if row.retained else "", row.description)
    return table


def _direction(row: TopicInfo) -> str:
    return "in" if row.incoming else "out"
