"""Gives a process a file system, a network and process numbers of its own, by the kernel's namespaces.

As root, they are made directly. Otherwise a user namespace is made first, which many systems and containers forbid.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from runtime.tools.sandbox import linux

NEW_USER = 0x10000000
OWN_FOLDER = Path("/sandbox")
_NEW_MOUNTS, _NEW_UTS, _NEW_IPC, _NEW_PIDS, _NEW_NETWORK = 0x20000, 0x4000000, 0x8000000, 0x20000000, 0x40000000
_READ_ONLY, _NO_SUID, _NO_DEVICES, _NO_EXECUTE, _REMOUNT, _BIND = 1, 2, 4, 8, 32, 4096
_RECURSIVE, _PRIVATE = 16384, 1 << 18
_DETACH = 2
_KEPT = {8: _NO_EXECUTE, 1024: 1024, 2048: 2048, 4096: 1 << 21}
"""Flags that a bind mount must keep, as statvfs and mount write them: noexec, noatime, nodiratime, relatime."""


def enter(root: Path, readable: Iterable[Path], devices: Iterable[Path], user: int, max_bytes: int) -> None:
    """Move this process, and its children, to a file system of their own, without a network.

    It holds the readable files and folders, and the devices, under their usual paths. Its one writable folder is
    OWN_FOLDER, which belongs to `user` and holds up to `max_bytes`, in memory. `root` is an empty folder that serves as
    mount point; nothing appears in it for other processes. Children also have new process numbers.

    Raise OSError if the kernel refuses.
    """
    _unshare()
    linux.mount(None, "/", None, _RECURSIVE | _PRIVATE)
    linux.mount("tmpfs", str(root), "tmpfs", _NO_SUID | _NO_DEVICES, "size=1m,mode=755")
    for path in readable:
        _show(path, root)
    for path in devices:
        linux.mount(str(path), str(_place(path, root)), None, _BIND)
    _make_own_folder(root / OWN_FOLDER.relative_to("/"), user, max_bytes)
    os.chdir(root)
    linux.syscall(linux.Call.PIVOT_ROOT, b".", b".")
    linux.unmount(".", _DETACH)
    linux.mount(None, "/", None, _REMOUNT | _BIND | _READ_ONLY | _NO_SUID | _NO_DEVICES)
    os.chdir("/")


def _unshare() -> None:
    user, group = os.geteuid(), os.getegid()
    rootless = user != 0
    linux.unshare(_NEW_MOUNTS | _NEW_UTS | _NEW_IPC | _NEW_PIDS | _NEW_NETWORK | (NEW_USER if rootless else 0))
    if rootless:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def _show(path: Path, root: Path) -> None:
    """Mount a file or folder read-only, or copy a symbolic link such as /lib."""
    if path.is_symlink():
        target = root / path.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path.readlink())
        return
    target = _place(path, root)
    linux.mount(str(path), str(target), None, _BIND | _RECURSIVE)
    flags = os.statvfs(target).f_flag
    kept = sum(bit for shown, bit in _KEPT.items() if flags & shown)
    linux.mount(None, str(target), None, _REMOUNT | _BIND | _READ_ONLY | _NO_SUID | _NO_DEVICES | kept)


def _place(path: Path, root: Path) -> Path:
    """Return where a file or folder is mounted, after making an empty one there."""
    target = root / path.relative_to("/")
    if path.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    return target


def _make_own_folder(path: Path, user: int, max_bytes: int) -> None:
    path.mkdir()
    options = f"size={max_bytes},nr_inodes=4096,mode=700,uid={user}"
    linux.mount("tmpfs", str(path), "tmpfs", _NO_SUID | _NO_DEVICES | _NO_EXECUTE, options)
