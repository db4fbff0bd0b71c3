"""Limits which files a process can open, by Landlock. It needs no privilege."""

import ctypes
import errno
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from runtime.tools.sandbox import linux

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_SOCKET, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
_TRUNCATE, _IOCTL_DEVICE = 1 << 14, 1 << 15
_ALL_OF_VERSION_3 = (1 << 15) - 1
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
_READ = _READ_FILE | _READ_DIR
_WRITE = _ALL_OF_VERSION_3 & ~(_EXECUTE | _MAKE_CHAR | _MAKE_SOCKET | _MAKE_BLOCK)

_GET_VERSION, _PATH_BENEATH = 1, 1
_SCOPE_ABSTRACT_SOCKETS, _SCOPE_SIGNALS = 1, 2
_OLDEST, _WITH_DEVICES, _WITH_SCOPES = 3, 5, 6
"""Versions of Landlock: before 3 (Linux 6.2), it lets a process truncate any file."""


def restrict(readable: Iterable[Path], writable: Iterable[Path]) -> None:
    """Let this process open only these files and folders, for ever: the first to read, the second also to write.

    Raise OSError if the kernel has no Landlock, or one that is too old.
    """
    version = linux.syscall(linux.Call.LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _GET_VERSION)
    if version < _OLDEST:
        raise OSError(errno.ENOSYS, f"landlock: the kernel has version {version}; version {_OLDEST} is needed")
    files = _ALL_OF_VERSION_3 | (_IOCTL_DEVICE if version >= _WITH_DEVICES else 0)
    scopes = _SCOPE_ABSTRACT_SOCKETS | _SCOPE_SIGNALS if version >= _WITH_SCOPES else 0
    attributes = struct.pack("=QQQ", files, 0, scopes)[: 24 if scopes else 8]
    rules = linux.syscall(linux.Call.LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    for path in readable:
        _allow(rules, path, _READ)
    for path in writable:
        _allow(rules, path, _WRITE)
    linux.prctl(linux.Prctl.SET_NO_NEW_PRIVS, 1)
    linux.syscall(linux.Call.LANDLOCK_RESTRICT_SELF, rules, 0)
    os.close(rules)


def _allow(rules: int, path: Path, rights: int) -> None:
    there = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights if path.is_dir() else rights & _ON_FILES, there)
    linux.syscall(linux.Call.LANDLOCK_ADD_RULE, rules, _PATH_BENEATH, rule, 0)
    os.close(there)
