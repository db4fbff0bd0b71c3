"""The process that starts a command and ends every process that comes of it, however they detach themselves.

It ends them when the command ends, when the runtime closes the command's stdin, or when the runtime ends. Orphans
become its children (PR_SET_CHILD_SUBREAPER), so it finds all of them. It imports little, to start fast.
"""

import os
import select
import signal
import sys
from pathlib import Path
from typing import NoReturn

from runtime.tools import linux

_ROOT = Path(__file__).resolve().parents[2]
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); from runtime.tools import supervisor; supervisor.main(sys.argv[2:])"
)
_REAP_MS = 1000


class _Stop(BaseException):
    """The runtime ended, or sent SIGTERM."""


def command(*words: str) -> list[str]:
    """Return the command that runs another under a supervisor, with the same stdin, stdout, stderr and environment.

    Start it in a session of its own. It ends like the other command: with its exit status, or by its signal.
    """
    return [sys.executable, "-I", "-S", "-B", "-c", _BOOT, str(_ROOT), str(os.getpid()), *words]


def main(arguments: list[str]) -> NoReturn:
    """Supervise a command. The first argument is the PID of the runtime, the others are the command."""
    parent, *words = arguments
    linux.prctl(linux.Prctl.SET_CHILD_SUBREAPER, 1)
    child = None
    exit_code = 0
    try:
        signal.signal(signal.SIGTERM, _stop)
        linux.die_with_parent(by=signal.SIGTERM)
        if os.getppid() == int(parent):
            child = _start(words)
            _wait(child)
    except _Stop:
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        exit_code = _end_children(child)
    linux.end_like(exit_code)


def _stop(*_: object) -> NoReturn:
    raise _Stop


def _start(words: list[str]) -> int:
    child = os.fork()
    if child == 0:
        linux.die_with_parent()
        try:
            os.execvp(words[0], words)
        except OSError as error:
            print(f"{words[0]} cannot be started: {error.strerror}", file=sys.stderr, flush=True)
        finally:
            os._exit(127)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # the runtime sees the end of the output as soon as the command's processes close theirs
    os.dup2(null, 2)
    return child


def _wait(child: int) -> None:
    """Return when the command ends or the runtime closes its stdin. Reap orphans in the meantime."""
    events = select.poll()
    events.register(0, 0)  # reports only that the other end was closed
    events.register(os.pidfd_open(child), select.POLLIN)
    while not events.poll(_REAP_MS):
        while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and found.si_pid != child:
            os.waitpid(found.si_pid, 0)


def _end_children(child: int | None) -> int:
    """Kill all processes below this one and return the exit code of the command.

    The children of a killed process become children of this one, so the next round finds them.
    """
    exit_code = 0
    while True:
        for pid in _children():
            os.kill(pid, signal.SIGKILL)
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return exit_code
        if pid == child:
            exit_code = os.waitstatus_to_exitcode(status)


def _children() -> list[int]:
    """Return the PIDs of this process's children."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            if int(fields[1]) == os.getpid():
                found.append(int(entry.name))
    return found
