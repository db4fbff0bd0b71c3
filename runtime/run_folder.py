"""Where a run leaves its logs: one folder a run, the oldest removed."""

import logging
import os
import shutil
import time
from pathlib import Path

KEPT = 20


def root() -> Path:
    """$TROUPE_HOME, or the user's state folder."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(os.environ.get("TROUPE_HOME") or f"{state}/troupe").expanduser() / "runs"


def create() -> Path:
    """A new folder for this run; only the newest 20 are kept."""
    folder = root() / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder.mkdir(parents=True)
    for old in sorted(p for p in root().iterdir() if p.is_dir())[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def log_to(folder: Path) -> None:
    """Send this process's logging, vLLM's included, to a file instead of the user's screen."""
    handler = logging.FileHandler(folder / "troupe.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
