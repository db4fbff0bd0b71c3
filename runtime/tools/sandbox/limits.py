"""The limits of a process in the sandbox, and the privileges that it gives up."""

import os
import resource
import struct

from runtime.tools.sandbox import linux

NOBODY = 65534
_OPEN_FILES = 64
_CAPABILITY_VERSION_3 = 0x20080522


def become_nobody() -> None:
    """Change from root to the user nobody, for ever."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def drop_capabilities() -> None:
    """Give up the rights of root, for ever, whoever the user is."""
    header, none = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24)
    linux.syscall(linux.Call.CAPSET, header, none)


def set_limits(memory_bytes: int, cpu_s: int, file_max_bytes: int, threads: int | None) -> None:
    """Limit this process: address space, CPU time, the size of a file, and open files.

    `threads` also limits the threads of the user; None leaves them to the limit of the address space.
    """
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, _OPEN_FILES)
    _limit(resource.RLIMIT_FSIZE, file_max_bytes)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    _limit(resource.RLIMIT_AS, memory_bytes)
    if threads is not None:
        _limit(resource.RLIMIT_NPROC, threads)


def _limit(kind: int, value: int) -> None:
    resource.setrlimit(kind, (value, value))
