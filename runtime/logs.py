"""Logging of a command, to a file in its run folder. Nothing is logged to the terminal."""

import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path

LOG_BYTES = 64 << 20
"""At this size troupe.log is renamed to troupe.log.1, replacing the previous troupe.log.1."""


def log_to(folder: Path) -> None:
    """Send this process's logs and warnings, vLLM's included, to `troupe.log` in the folder."""
    handler = RotatingFileHandler(folder / "troupe.log", maxBytes=LOG_BYTES, backupCount=1)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in ("httpx2", "mcp"):  # they log every exchange, with a URL that may have a key in it
        logging.getLogger(name).setLevel(logging.WARNING)
