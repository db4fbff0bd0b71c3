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

    def sentences(self) -> tuple[str, ...]:
        """Return what is enforced here, and what is not, in plain words."""
        if not self.suffices:
            return (f"nothing: the sandbox does not work here ({'; '.join(self.faults)})",)
        layers = " and ".join(
            name for name, works in (("a mount namespace", self.namespaces), ("Landlock", self.landlock)) if works
        )
        always = (
            "network: code can open no socket, by a seccomp filter"
            + (", and has no network interface, by a network namespace" if self.namespaces else ""),
            f"files: code reads only the Python and system libraries, and writes only its own folder, by {layers}",
            "processes: code cannot start, signal or inspect another process, by a seccomp filter",
            "limits: CPU time, memory, size of a file and open files, by resource limits; wall time and output",
        )
        if self.namespaces:
            return (
                *always,
                "threads: limited, by a resource limit in a user namespace",
                "disk: its folder is in memory and limited in size",
                "user: nobody, without privileges" if os.geteuid() == 0 else "user: this one, without privileges",
            )
        return (
            *always,
            "user: this one, or nobody if it is root and anyone can read Python; without privileges",
            "not limited: threads, except by memory; the number of files in its folder",
            "not hidden: whether a file exists, its size and owner",
        )


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
