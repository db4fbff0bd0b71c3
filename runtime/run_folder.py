"""Where a run leaves its logs: one folder a run, the oldest removed."""

import logging
import os
import re
import shutil
import time
from pathlib import Path

from runtime.errors import TroupeError

KEPT = 20
_NAME = re.compile(r"\d{8}-\d{6}-(\d+)")


def root() -> Path:
    """$TROUPE_HOME, or the user's state folder."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(os.environ.get("TROUPE_HOME") or f"{state}/troupe").expanduser() / "runs"


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
    handler = logging.FileHandler(folder / "troupe.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
