"""`troupe engines`: show the engines of a running service, over HTTP."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import Any

import click
from rich.console import Console, Group
from rich.table import Table

from runtime import config as configuration
from runtime.cli import measured
from runtime.cli.config_option import config_option
from runtime.control.costs import StepCost
from runtime.control.snapshot import DeviceMoment
from runtime.errors import TroupeError

TOKEN_VARIABLE = "TROUPE_TOKEN"
TIMEOUT_S = 10


@click.command()
@config_option()
@click.option("--url", help="The address of the service, instead of the one in the configuration.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON that /engines and /devices return.")
def engines(config: str, url: str | None, as_json: bool) -> None:
    """Show each engine of a running service: its share, KV cache, requests, and what its steps cost.

    If the service needs a token, set it in $TROUPE_TOKEN; the token needs the scope `read`.
    """
    service = configuration.load(config).service
    address = url or f"http://{service.host}:{service.port}"
    infos, devices = _get(f"{address}/engines"), _get(f"{address}/devices")
    if as_json:
        click.echo(json.dumps({"engines": infos, "devices": devices}, indent=1))
    else:
        Console(highlight=False).print(tables(infos, devices))


def tables(infos: Sequence[Mapping[str, Any]], devices: Mapping[str, Mapping[str, Any]]) -> Group:
    """Return tables of what /engines and /devices return."""
    costs = {info["name"]: (StepCost(**info["cost"]), info["utilization"]) for info in infos if info["cost"]}
    return Group(
        _table(infos), measured.table(costs, {name: DeviceMoment(**device) for name, device in devices.items()})
    )


def _table(infos: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("engine", "seats", "state", "share", "KV MiB", "used", "running", "waiting", "max"):
        table.add_column(title, justify="left" if title in ("engine", "seats", "state") else "right")
    for info in infos:
        grant = info["grant"]
        table.add_row(
            info["name"] + (" (pinned)" if info["pinned"] else ""),
            ", ".join(info["seats"]),
            info["state"],
            f"{grant['gpu_memory_utilization']:.1%}" if grant else "",
            f"{info['kv_cache_bytes'] / 2**20:.1f}",
            f"{info['kv_cache_usage']:.0%}",
            str(info["running"]),
            str(info["waiting"]),
            measured.concurrency(grant["max_active_seqs"], info["paused_s"]) if grant else "",
        )
    return table


def _get(url: str) -> Any:
    if not url.startswith(("http://", "https://")):
        raise TroupeError(f"--url: {url!r} is not a valid address; give one such as http://127.0.0.1:8000")
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not (token.isascii() and token.isprintable()):
        raise TroupeError(f"{TOKEN_VARIABLE} has a character that no token has; copy the token again")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        try:
            message = json.load(error)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = str(error)
        raise TroupeError(f"{url}: {message}") from None
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise TroupeError(f"no service answers at {url}: {reason}; start one with `troupe serve`") from None
