"""The system calls that code in the sandbox may make: those of a program that computes in one process.

The filter lists what is allowed, so a system call that a later kernel adds is refused. Among those refused are all that
open a socket to anything, start a process or a program, signal or inspect another process, or change a namespace, a
mount or a kernel setting.
"""

import ctypes
import errno
import platform
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from runtime.tools.sandbox import linux

# fmt: off
ALLOWED = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23,
    "sched_yield": 24, "mremap": 25, "msync": 26, "mincore": 27, "madvise": 28, "dup": 32, "dup2": 33, "pause": 34,
    "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39, "sendfile": 40, "sendto": 44,
    "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48, "getsockname": 51, "getpeername": 52,
    "getsockopt": 55, "exit": 60, "wait4": 61, "uname": 63, "flock": 73, "fsync": 74,
    "fdatasync": 75, "ftruncate": 77, "getdents": 78, "getcwd": 79, "chdir": 80, "fchdir": 81, "rename": 82,
    "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87, "symlink": 88, "readlink": 89, "umask": 95,
    "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104,
    "geteuid": 107, "getegid": 108, "getppid": 110, "getpgrp": 111, "getgroups": 115, "getresuid": 118,
    "getresgid": 120, "getpgid": 121, "getsid": 124, "rt_sigpending": 127, "rt_sigtimedwait": 128,
    "rt_sigsuspend": 130, "sigaltstack": 131, "statfs": 137, "fstatfs": 138, "gettid": 186, "readahead": 187,
    "getxattr": 191, "lgetxattr": 192, "fgetxattr": 193, "listxattr": 194, "llistxattr": 195, "flistxattr": 196,
    "time": 201, "futex": 202, "sched_getaffinity": 204, "epoll_create": 213, "getdents64": 217,
    "set_tid_address": 218, "restart_syscall": 219, "fadvise64": 221, "timer_create": 222, "timer_settime": 223,
    "timer_gettime": 224, "timer_getoverrun": 225, "timer_delete": 226, "clock_gettime": 228, "clock_getres": 229,
    "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "waitid": 247, "openat": 257,
    "mkdirat": 258, "newfstatat": 262, "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266,
    "readlinkat": 267, "faccessat": 269, "pselect6": 270, "ppoll": 271, "set_robust_list": 273,
    "get_robust_list": 274, "epoll_pwait": 281, "timerfd_create": 283, "eventfd": 284, "fallocate": 285,
    "timerfd_settime": 286, "timerfd_gettime": 287, "eventfd2": 290, "epoll_create1": 291, "dup3": 292, "pipe2": 293,
    "preadv": 295, "pwritev": 296, "getcpu": 309, "renameat2": 316, "getrandom": 318, "membarrier": 324,
    "copy_file_range": 326, "preadv2": 327, "pwritev2": 328, "statx": 332, "rseq": 334, "close_range": 436,
    "openat2": 437, "faccessat2": 439, "epoll_pwait2": 441, "futex_waitv": 449,
}
# fmt: on
"""The system calls that are allowed with any arguments, and their numbers on x86-64."""

# fmt: off
ALLOWED_ON_OWN_FILES = {
    "truncate": 76, "chmod": 90, "fchmod": 91, "utime": 132, "utimes": 235, "futimesat": 261, "fchmodat": 268,
    "utimensat": 280,
}
# fmt: on
"""Allowed only in a file system of its own, because Landlock does not see them."""

_CLONE, _CLONE3, _LAST_KNOWN = 56, 435, 450
_THREAD, _NAMESPACES = 0x00010000, 0x7E020000
_AF_UNIX, _SOCK_STREAM, _SOCK_TYPE = 1, 1, 0xF

_ARCHITECTURE_X86_64 = 0xC000003E
_KILL_PROCESS, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LOAD, _AND, _JUMP_IF_EQUAL, _JUMP_IF_GREATER, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x06
_AT_NUMBER, _AT_ARCHITECTURE, _AT_ARGUMENTS = 0, 4, 16
_SECCOMP_MODE_FILTER = 2

Instruction = tuple[int, int, int, int]
"""A BPF instruction: code, jump if true, jump if false, constant."""


@dataclass(frozen=True)
class Check:
    """A condition on the lower 32 bits of one argument: masked, it is one of the values."""

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF


def conditional(pid: int) -> dict[int, tuple[Check, ...]]:
    """Return the system calls that are allowed if their arguments meet all checks. The process has this PID."""
    return {
        _CLONE: (Check(0, (_THREAD,), _THREAD | _NAMESPACES),),  # a thread, not a process
        62: (Check(0, (pid,)),),  # kill
        234: (Check(0, (pid,)),),  # tgkill
        302: (Check(0, (0, pid)),),  # prlimit64
        53: (Check(0, (_AF_UNIX,)), Check(1, (_SOCK_STREAM,), _SOCK_TYPE)),  # socketpair, which asyncio needs
        157: (Check(0, (15, 16)),),  # prctl: the thread's name
        16: (
            Check(1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
        ),  # ioctl: terminals, FIONREAD, FIONBIO, FIOCLEX
        # fcntl: not F_SETOWN and F_SETSIG, which signal other processes
        72: (Check(1, (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1031, 1032)),),
    }


def program(pid: int, own_files: bool) -> list[Instruction]:
    """Return the filter as a BPF program. Refused calls fail with EPERM, and unknown ones with ENOSYS.

    libc has fallbacks for unknown calls. One of them is clone3, whose flags a filter cannot read.
    """
    allowed = {**ALLOWED, **ALLOWED_ON_OWN_FILES} if own_files else ALLOWED
    return [
        (_LOAD, 0, 0, _AT_ARCHITECTURE),
        (_JUMP_IF_EQUAL, 1, 0, _ARCHITECTURE_X86_64),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _AT_NUMBER),
        (_JUMP_IF_EQUAL, 1, 0, _CLONE3),
        (_JUMP_IF_GREATER, 0, 1, _LAST_KNOWN),  # also the calls of the x32 ABI
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
        *(i for number in allowed.values() for i in ((_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW))),
        *(i for number, checks in conditional(pid).items() for i in _if_checked(number, checks)),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]


def _if_checked(number: int, checks: Iterable[Check]) -> list[Instruction]:
    body = [instruction for check in checks for instruction in _checked(check)]
    return [(_JUMP_IF_EQUAL, 0, len(body) + 1, number), *body, (_RETURN, 0, 0, _ALLOW)]


def _checked(check: Check) -> list[Instruction]:
    last = len(check.values)
    return [
        (_LOAD, 0, 0, _AT_ARGUMENTS + 8 * check.argument),
        (_AND, 0, 0, check.mask),
        *((_JUMP_IF_EQUAL, last - index, 0, value) for index, value in enumerate(check.values)),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def restrict(pid: int, own_files: bool) -> None:
    """Allow this process, with this PID, only the calls of the filter, for ever. It needs no privilege.

    Raise OSError if the machine is not x86-64 or the kernel refuses.
    """
    if platform.machine() != "x86_64":
        raise OSError(errno.ENOSYS, f"seccomp: the filter is for x86-64, and this machine is {platform.machine()}")
    instructions = program(pid, own_files)
    packed = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in instructions))
    linux.prctl(linux.Prctl.SET_NO_NEW_PRIVS, 1)
    filter_ = _Program(len(instructions), ctypes.addressof(packed))
    linux.prctl(linux.Prctl.SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(filter_))
