"""The paths of what Troupe stores: a service's jobs and tokens, and the folders of runs."""

import os
from pathlib import Path

from runtime.config import Service


def home() -> Path:
    """Return $TROUPE_HOME if it is set, else the folder `troupe` in the user's state folder."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(os.environ.get("TROUPE_HOME") or f"{state}/troupe").expanduser()


def journal(service: Service) -> Path:
    """Return the SQLite file that holds a service's jobs."""
    return Path(service.journal).expanduser() if service.journal else home() / "jobs.db"


def tokens(service: Service) -> Path:
    """Return the file that holds the hashes of a service's tokens."""
    return Path(service.tokens).expanduser() if service.tokens else home() / "tokens.json"


def runs() -> Path:
    """Return the folder that holds the folders of runs."""
    return home() / "runs"
