"""Finds out what the sandbox can enforce on this machine, by trying it."""

import os
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache

from runtime.tools.sandbox import jail

ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8"}
"""All that code in the sandbox sees of the environment, besides HOME, its own folder."""

_TRY_S = 60


@dataclass(frozen=True)
class Protections:
    """The layers that work on this machine. Without namespaces and Landlock, the sandbox refuses to run.

    `faults` says what failed, for each better combination of layers that was tried.
    """

    namespaces: bool
    landlock: bool
    faults: tuple[str, ...] = ()

    @property
    def suffices(self) -> bool:
        """Return True if code has no network and cannot read the machine's files."""
        return self.namespaces or self.landlock


@cache
def detect() -> Protections:
    """Return the best protections that work here. Starts one to three processes, each for a fraction of a second."""
    faults: list[str] = []
    for namespaces, landlock in ((True, True), (False, True), (True, False)):
        fault = fault_of(namespaces, landlock)
        if fault is None:
            return Protections(namespaces, landlock, tuple(dict.fromkeys(faults)))
        faults.append(fault)
    return Protections(False, False, tuple(dict.fromkeys(faults)))


def fault_of(namespaces: bool, landlock: bool) -> str | None:
    """Return why code cannot run under these layers, or None if it can."""
    with tempfile.TemporaryDirectory(prefix="troupe-sandbox-") as folder:
        settings = jail.Settings(
            folder=folder,
            parent=os.getpid(),
            namespaces=namespaces,
            landlock=landlock,
            memory_bytes=256 << 20,
            cpu_s=_TRY_S,
            file_max_bytes=1 << 20,
            threads=1,
        )
        try:
            done = subprocess.run(
                jail.command(settings),
                input=b"print('it runs')",
                capture_output=True,
                env=ENVIRONMENT,
                timeout=_TRY_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    if done.stdout == b"it runs\n" and not done.stderr:
        return None
    lines = done.stderr.decode(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), f"it ended with {done.returncode}")
