"""Where Troupe keeps what stays: a service's jobs and tokens, and the logs of runs, one folder each, the oldest
removed."""

import logging
import os
import re
import shutil
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path

from runtime.config import Service
from runtime.errors import TroupeError

KEPT = 20
LOG_BYTES = 64 << 20
"""A log of this size becomes troupe.log.1, and the one that had that name before goes."""
_NAME = re.compile(r"\d{8}-\d{6}-(\d+)")


def home() -> Path:
    """$TROUPE_HOME, or the user's state folder."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(os.environ.get("TROUPE_HOME") or f"{state}/troupe").expanduser()


def journal(service: Service) -> Path:
    """Where a service keeps its jobs."""
    return Path(service.journal).expanduser() if service.journal else home() / "jobs.db"


def tokens(service: Service) -> Path:
    """Where it keeps its tokens."""
    return Path(service.tokens).expanduser() if service.tokens else home() / "tokens.json"


def root() -> Path:
    """Where the folders of runs are."""
    return home() / "runs"


def create() -> Path:
    """A new folder for this run; of those whose process has ended the newest 20 are kept. Raises TroupeError."""
    folder = root() / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ended = sorted(old for old in root().iterdir() if _has_ended(old))
    except OSError as error:
        raise TroupeError(
            f"no folder for logs in {root()}: {error.strerror}; set TROUPE_HOME to one that can be written"
        ) from None
    for old in ended[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _has_ended(folder: Path) -> bool:
    """Whether it is a run's folder, by its name, and no process of that number lives."""
    match = _NAME.fullmatch(folder.name)
    return match is not None and not Path("/proc", match[1]).exists()


def log_to(folder: Path) -> None:
    """Send this process's logging, vLLM's included, to a file instead of the user's screen."""
    handler = RotatingFileHandler(folder / "troupe.log", maxBytes=LOG_BYTES, backupCount=1)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
