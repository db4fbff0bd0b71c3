"""A program that runs another program, and ends it with all its descendants.

    python -I -S guard.py LIFELINE_FD PARENT_PID COMMAND [ARGUMENT ...]

The guard passes its standard streams on. It ends the program when the lifeline, a pipe, is closed or when its parent
ends, and it ends what the program left behind when the program exits. It is a process of its own, so it does this even
if the parent gets SIGKILL. Descendants cannot escape by a new session: the kernel gives orphans to the guard.

It imports only the standard library, because it runs by its path.
"""

import ctypes
import os
import select
import signal
import sys
import time
from pathlib import Path

GRACE_S = 1.0
"""The time between SIGTERM and SIGKILL."""

GIVE_UP_S = 10.0
"""The guard exits this long after the first SIGKILL, even if the kernel has not ended a process by then."""

CANNOT_RUN = 127
"""The exit status if the program cannot be run, as in a shell."""

SIGNALLED = 128
"""The exit status is this plus the signal's number if a signal ended the program, as in a shell.

So the guard itself ends by a signal only if it was killed.
"""

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def main(lifeline_fd: int, parent_pid: int, command: list[str]) -> int:
    """Run the command until it exits or must end. Return its exit status."""
    wakeup_fd = _wake_on(signal.SIGCHLD, signal.SIGTERM)
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:
        return 1
    os.set_inheritable(lifeline_fd, False)
    program_pid = _start(command)
    _let_go_of_streams()
    status = _wait(program_pid, lifeline_fd, wakeup_fd)
    _end_descendants()
    return status


def _wake_on(*signals: int) -> int:
    """Return a descriptor that becomes readable on each of these signals, which no longer end this process."""
    wakeup_fd, write_fd = os.pipe()
    os.set_blocking(wakeup_fd, False)
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    for number in signals:
        signal.signal(number, lambda *_: None)
    return wakeup_fd


def _start(command: list[str]) -> int:
    guard_pid = os.getpid()
    program_pid = os.fork()
    if program_pid:
        return program_pid
    try:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # if the guard itself gets SIGKILL
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and programs inherit that
        if os.getppid() == guard_pid:
            os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"cannot run {command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(CANNOT_RUN)


def _let_go_of_streams() -> None:
    """Leave the pipes to the program, so that they close when it does."""
    null_fd = os.open(os.devnull, os.O_RDWR)
    for stream_fd in (0, 1, 2):
        os.dup2(null_fd, stream_fd)


def _wait(program_pid: int, lifeline_fd: int, wakeup_fd: int) -> int:
    """Wait until the program exits, or must end because the lifeline closes or SIGTERM arrives. Return its status."""
    while True:
        readable, _, _ = select.select([lifeline_fd, wakeup_fd], [], [])
        numbers = os.read(wakeup_fd, 4096) if wakeup_fd in readable else b""
        statuses = _reap()
        if program_pid in statuses:
            return statuses[program_pid]
        if lifeline_fd in readable or signal.SIGTERM in numbers:
            return SIGNALLED + signal.SIGTERM


def _reap() -> dict[int, int]:
    """Return the exit statuses of the children that have ended, by process id."""
    statuses = {}
    try:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(ended[1])
            statuses[ended[0]] = code if code >= 0 else SIGNALLED - code
    except ChildProcessError:
        pass
    return statuses


def _end_descendants() -> None:
    for number, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GIVE_UP_S)):
        until_s = time.monotonic() + wait_s
        signalled: set[int] = set()
        while descendants := _descendants():
            if time.monotonic() > until_s:
                break
            # SIGKILL is repeated: a process may have forked while /proc was read.
            for pid in descendants if number == signal.SIGKILL else descendants - signalled:
                try:
                    os.kill(pid, number)
                except (ProcessLookupError, PermissionError):
                    continue
            signalled |= descendants
            time.sleep(0.01)
            _reap()
    _reap()


def _descendants() -> set[int]:
    """Return the process ids of all descendants, without those that have ended and wait for their parent."""
    children: dict[int, list[int]] = {}
    ended = set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            state, parent = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue  # it ended meanwhile
        children.setdefault(int(parent), []).append(int(folder.name))
        if state == "Z":
            ended.add(int(folder.name))
    found: set[int] = set()
    pending = [os.getpid()]
    while pending:
        below = children.get(pending.pop(), [])
        found.update(below)
        pending.extend(below)
    return found - ended


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
