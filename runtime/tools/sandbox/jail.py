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
import select
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime.tools.sandbox import files, landlock, limits, linux, namespaces, seccomp, user_code

_ROOT = Path(__file__).resolve().parents[3]
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from runtime.tools.sandbox import jail; jail.main(sys.argv[2])"


@dataclass(frozen=True)
class Settings:
    """The order to the launcher. `folder` is empty: the jail's own, or the mount point of its file system.

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
    linux.die_with_parent()
    if os.getppid() != settings.parent:
        sys.exit("the runtime ended")
    os.umask(0o022)
    readable = files.readable()
    launcher_lives, launcher_end = os.pipe()
    children = []
    if settings.namespaces:
        user = limits.NOBODY if os.geteuid() == 0 else os.geteuid()
        namespaces.enter(Path(settings.folder), readable, files.DEVICES, user, settings.file_max_bytes)
        children.append(_fork_init(launcher_lives, launcher_end))
    source = sys.stdin.buffer.read().decode(errors="replace")
    jail = os.fork()
    if jail == 0:
        os.close(launcher_end)
        _enter_jail(settings, readable, launcher_lives)
        _forget_runtime()
        sys.exit(user_code.run(source))
    os.dup2(os.open("/dev/null", os.O_WRONLY), sys.stderr.fileno())
    exit_code = _exit_code(jail, settings.cpu_s)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    linux.end_like(exit_code)


def _fork_init(launcher_lives: int, launcher_end: int) -> int:
    """Fork the first process of the new process numbers, and return its PID. It ends when the launcher does.

    With it, the jail is an ordinary process, which signals end.
    """
    child = os.fork()
    if child == 0:
        os.close(launcher_end)
        os.closerange(0, 3)
        os.read(launcher_lives, 1)
        os._exit(0)
    return child


def _enter_jail(settings: Settings, readable: list[Path], launcher_lives: int) -> None:
    folder = namespaces.OWN_FOLDER if settings.namespaces else Path(settings.folder)
    as_root = os.geteuid() == 0
    if as_root and (settings.namespaces or all(map(files.anyone_can_read, filter(Path.is_dir, readable)))):
        if not settings.namespaces:
            os.chown(folder, limits.NOBODY, limits.NOBODY)
        limits.become_nobody()
        if settings.namespaces:
            linux.unshare(namespaces.NEW_USER)  # its threads are counted apart from those of other calls
    linux.die_with_parent()
    if select.select([launcher_lives], [], [], 0)[0]:  # the launcher ended before the line above
        os._exit(1)
    os.close(launcher_lives)
    os.chdir(folder)
    os.environ["HOME"] = str(folder)
    others = 0 if as_root else 2  # the launcher and init count if they are in the same user namespace
    threads = settings.threads + others if settings.namespaces else None
    linux.use_one_malloc_arena()
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


def _forget_runtime() -> None:
    """Let the code see the modules of a new interpreter only."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "runtime"]:
        del sys.modules[name]


def _exit_code(jail: int, cpu_s: int) -> int:
    """Wait for the jail. Return its exit status, or its signal as a negative number: SIGXCPU after its CPU time."""
    _, status, used = os.wait4(jail, 0)
    exit_code = os.waitstatus_to_exitcode(status)
    return -signal.SIGXCPU if exit_code < 0 and used.ru_utime + used.ru_stime >= cpu_s else exit_code
