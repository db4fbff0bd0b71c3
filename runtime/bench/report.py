"""placeholder while the report is being written elsewhere"""

from pathlib import Path


def write(folder: Path) -> Path:
    return folder
