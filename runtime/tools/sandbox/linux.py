"""Linux system calls that Python has no name for, and how the sandbox's processes end with each other."""

import ctypes
import os
import resource
import signal
from enum import IntEnum
from typing import NoReturn

_libc = ctypes.CDLL(None, use_errno=True)


class Call(IntEnum):
    """The numbers of system calls. Those of Landlock are the same on every architecture."""

    PIVOT_ROOT = 155  # x86-64
    CAPSET = 126  # x86-64
    LANDLOCK_CREATE_RULESET = 444
    LANDLOCK_ADD_RULE = 445
    LANDLOCK_RESTRICT_SELF = 446


class Prctl(IntEnum):
    """Operations of prctl."""

    SET_PDEATHSIG = 1
    SET_SECCOMP = 22
    SET_NO_NEW_PRIVS = 38


def syscall(call: Call, *arguments: object) -> int:
    """Make a system call and return its result. Raise OSError if it fails."""
    return _checked(_libc.syscall(call.value, *arguments), call.name.lower())


def prctl(operation: Prctl, *arguments: object) -> None:
    """Change a property of this process or thread. Raise OSError if the kernel refuses."""
    words = [*arguments, 0, 0, 0, 0][:4]
    _checked(_libc.prctl(operation.value, *words), f"prctl {operation.name}")


def use_one_malloc_arena() -> None:
    """Keep glibc from reserving 64 MiB of address space for each thread, which would use up the memory limit."""
    m_arena_max = -8
    _libc.mallopt(m_arena_max, 1)


def die_with_parent() -> None:
    """Have the kernel send this process SIGKILL when its parent ends. A change of user undoes it."""
    prctl(Prctl.SET_PDEATHSIG, signal.SIGKILL)


def end_like(exit_code: int) -> NoReturn:
    """End this process with an exit status, or by the signal whose negative number this is."""
    if exit_code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -exit_code != signal.SIGKILL:
            signal.signal(-exit_code, signal.SIG_DFL)
        os.kill(os.getpid(), -exit_code)
    os._exit(exit_code & 0xFF)


def unshare(flags: int) -> None:
    """Move this process to new namespaces. Raise OSError if the kernel refuses."""
    _checked(_libc.unshare(flags), "unshare")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Mount a file system, or change a mount. Raise OSError if the kernel refuses."""
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind, data)]
    result = _libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3])
    _checked(result, f"mount {target}")


def unmount(target: str, flags: int) -> None:
    """Unmount a file system. Raise OSError if the kernel refuses."""
    _checked(_libc.umount2(os.fsencode(target), flags), f"umount {target}")


def _checked(result: int, what: str) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
