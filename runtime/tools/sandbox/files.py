"""The files of the machine that code in the sandbox can read: Python's library, the system's, and time zones."""

import sys
import sysconfig
from pathlib import Path

_SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")
DEVICES = (Path("/dev/null"), Path("/dev/urandom"))


def readable() -> list[Path]:
    """Return the files and folders that exist here, none inside another."""
    python = (f"{sys.base_prefix}/lib", sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    found = [path for path in map(Path, (*_SYSTEM, *python)) if path.exists()]
    return [path for path in dict.fromkeys(found) if not any(other in path.parents for other in found)]


def anyone_can_read(path: Path) -> bool:
    """Return True if every user can list this folder."""
    return all(each.stat().st_mode & 0o001 for each in path.parents) and path.stat().st_mode & 0o005 == 0o005
