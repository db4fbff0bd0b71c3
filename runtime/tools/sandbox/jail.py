"""The process that runs code in the sandbox, from its start to its end.

1. The launcher, a new Python, enters the namespaces and forks the jail.
2. The jail gives up its privileges, sets its limits and its filters, and only then runs the code.
3. The launcher waits for the jail and ends the way it did: with its exit status, or by its signal.

The launcher reads the code from stdin. Output goes to stdout. Faults of the setup go to stderr, which closes when the
setup is complete. Any exception before that ends the process, so the code never runs with less protection than asked.
"""

import io
import json
import os
import resource
import select
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from runtime.tools.sandbox import files, landlock, limits, linux, namespaces, seccomp, user_code

_ROOT = Path(__file__).resolve().parents[3]
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from runtime.tools.sandbox import jail; jail.main(sys.argv[2])"


@dataclass(frozen=True)
class Settings:
    """What the launcher is told. `folder` is empty: the jail's own, or the mount point of its file system.

    Without `namespaces`, Landlock keeps the jail away from other files. There are the two together where possible.
    """

    folder: str
    parent: int
    namespaces: bool
    landlock: bool
    memory_bytes: int
    cpu_s: int
    file_max_bytes: int
    threads: int


def command(settings: Settings) -> list[str]:
    """Return the command that runs code from its stdin in a jail. It needs no environment."""
    return [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _BOOT, str(_ROOT), json.dumps(asdict(settings))]


def main(written: str) -> None:
    """Run the code on stdin in a jail with these settings, which are JSON."""
    settings = Settings(**json.loads(written))
    sys.path.remove(str(_ROOT))
    sys.argv = [""]
    die_with_parent()
    if os.getppid() != settings.parent:
        sys.exit(1)
    os.umask(0o022)
    readable = files.readable()
    if settings.namespaces:
        user = limits.NOBODY if os.geteuid() == 0 else os.geteuid()
        namespaces.enter(Path(settings.folder), readable, files.DEVICES, user, settings.file_max_bytes)
        _fork_init()
    source = sys.stdin.buffer.read().decode(errors="replace")
    launcher_lives, launcher_end = os.pipe()
    jail = os.fork()
    if jail == 0:
        os.close(launcher_end)
        _enter_jail(settings, readable, launcher_lives)
        sys.exit(user_code.run(source))
    os.dup2(os.open("/dev/null", os.O_WRONLY), sys.stderr.fileno())
    _end_like(jail, settings.cpu_s)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends. A change of user undoes it."""
    linux.prctl(linux.Prctl.SET_PDEATHSIG, signal.SIGKILL)


def _fork_init() -> None:
    """Fork the first process of the new process numbers. It only waits, and the jail can be killed by any signal."""
    if os.fork() == 0:
        die_with_parent()
        os.closerange(0, 3)
        while True:
            signal.pause()


def _enter_jail(settings: Settings, readable: list[Path], launcher_lives: int) -> None:
    folder = namespaces.OWN_FOLDER if settings.namespaces else Path(settings.folder)
    if os.geteuid() == 0 and (settings.namespaces or all(map(files.anyone_can_read, filter(Path.is_dir, readable)))):
        if not settings.namespaces:
            os.chown(folder, limits.NOBODY, limits.NOBODY)
        limits.become_nobody()
        if settings.namespaces:
            linux.unshare(namespaces.NEW_USER)  # its threads are counted apart from those of other calls
    die_with_parent()
    if select.select([launcher_lives], [], [], 0)[0]:  # the launcher ended before the line above
        os._exit(1)
    os.close(launcher_lives)
    os.chdir(folder)
    os.environ["HOME"] = str(folder)
    threads = settings.threads + 2 if settings.namespaces else None  # the launcher and init may count, too
    limits.set_limits(settings.memory_bytes, settings.cpu_s, settings.file_max_bytes, threads)
    if settings.landlock:
        landlock.restrict(readable, [folder, *files.DEVICES])
    limits.drop_capabilities()
    seccomp.restrict(os.getpid(), own_files=settings.namespaces)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(1, 2)  # closes the jail's end of the launcher's stderr: the setup is complete
    for name, number in (("stdout", 1), ("stderr", 2)):
        raw = open(number, "wb", closefd=False)  # noqa: SIM115  open as long as the process
        setattr(sys, name, io.TextIOWrapper(raw, "utf-8", "backslashreplace", line_buffering=True))


def _end_like(jail: int, cpu_s: int) -> NoReturn:
    """Wait for the jail, and end with its exit status or by its signal: SIGXCPU if it used up its CPU time."""
    _, status, used = os.wait4(jail, 0)
    if os.WIFSIGNALED(status):
        number = signal.SIGXCPU if used.ru_utime + used.ru_stime >= cpu_s else os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))
