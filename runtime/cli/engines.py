"""`troupe engines`: the engines of a service that runs, asked over HTTP."""

import json
import os
import urllib.error
import urllib.request
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from runtime import config as configuration
from runtime.errors import TroupeError

TOKEN_VARIABLE = "TROUPE_TOKEN"


@click.command()
@click.option("--config", "-c", default=configuration.DEFAULT, show_default=True, help="A file, or a shipped name.")
@click.option("--url", help="Where the service listens, instead of where the configuration says.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, as /engines has it.")
def engines(config: str, url: str | None, as_json: bool) -> None:
    """Each engine of a running service: its share, its KV cache, what it does. A token is taken from $TROUPE_TOKEN."""
    service = configuration.load(config).service
    found = _ask(f"{url or f'http://{service.host}:{service.port}'}/engines")
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("engine", "seats", "state", "share", "KV MiB", "used", "running", "waiting", "at most"):
        shown.add_column(title, justify="left" if title in ("engine", "seats", "state") else "right")
    for engine in found:
        grant = engine["grant"]
        shown.add_row(
            engine["name"] + (" (pinned)" if engine["pinned"] else ""),
            ", ".join(engine["seats"]),
            engine["state"],
            f"{grant['gpu_memory_utilization']:.1%}" if grant else "",
            f"{engine['kv_cache_bytes'] / 2**20:.1f}",
            f"{engine['kv_cache_usage']:.0%}",
            str(engine["running"]),
            str(engine["waiting"]),
            str(grant["max_active_seqs"]) if grant else "",
        )
    Console(highlight=False).print(shown)


def _ask(url: str) -> list[dict[str, Any]]:
    if not url.startswith(("http://", "https://")):
        raise TroupeError(f"--url: {url!r} is no address such as http://127.0.0.1:8000")
    token = os.environ.get(TOKEN_VARIABLE)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            found: list[dict[str, Any]] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        try:
            text = json.load(error)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            text = str(error)
        raise TroupeError(f"{url}: {text}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise TroupeError(f"no service answers at {url}: {reason}; start one with `troupe serve`") from None
