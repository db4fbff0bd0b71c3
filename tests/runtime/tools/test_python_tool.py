"""The python tool against code that tries to get out, each with a real process."""

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path

import psutil
import pytest
from pydantic import ByteSize

from runtime.tools import python_tool
from runtime.tools.python_tool import PythonTool
from runtime.tools.sandbox.protections import Protections, fault_of
from runtime.tools.tool import ToolError
from tests.runtime.tools.processes import LONG_S, all_end, below, until

ROOT = Path(__file__).resolve().parents[3]
LAYERS = {
    "both": Protections(namespaces=True, landlock=True),
    "landlock": Protections(namespaces=False, landlock=True),
    "namespaces": Protections(namespaces=True, landlock=False),
}
fault_here = cache(fault_of)


@pytest.fixture(params=LAYERS)
def layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Protections:
    """Make the tool use one combination of layers, though the machine may have more."""
    chosen = LAYERS[request.param]
    if fault := fault_here(chosen.namespaces, chosen.landlock):
        pytest.skip(f"this machine lacks a layer: {fault}")
    monkeypatch.setattr(python_tool, "detect", lambda: chosen)
    return chosen


@pytest.fixture
async def python(layers: Protections) -> AsyncIterator[PythonTool]:
    """Return a tool with ample time, for code that ends. Nothing of it may be left behind."""
    async with checked(PythonTool.Options(timeout_s=LONG_S)) as tool:
        yield tool


def sandbox_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("troupe-sandbox-*"))


class checked(PythonTool):  # noqa: N801  used like a function
    """A tool whose processes and folders are gone after it."""

    async def __aenter__(self) -> "checked":
        self.before = below(os.getpid())
        self.folders = sandbox_folders()
        await super().__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await super().__aexit__(*exc)
        await all_end(below(os.getpid()) - self.before)
        mine = sandbox_folders() - self.folders
        await until(lambda: not any(folder.exists() for folder in mine))


async def run(tool: PythonTool, code: str) -> str:
    return await tool.call({"code": code})


async def test_prints_the_value_of_the_last_expression(python: PythonTool) -> None:
    assert (
        await run(python, "import sys\nprint('a')\nprint('b', file=sys.stderr)\nprint('c')\n6 * 7") == "a\nb\nc\n42\n"
    )
    assert await run(python, "x = 1\nNone") == ""
    assert await run(python, "") == ""


async def test_traceback_shows_only_the_code(python: PythonTool) -> None:
    output = await run(python, "import json\ndef f():\n    json.loads('{')\nprint('before')\nf()")
    assert output.startswith(
        'before\nTraceback (most recent call last):\n  File "<python>", line 5, in <module>\n    f()'
    )
    assert output.count("File ") == 2
    assert output.splitlines()[-1].startswith("json.decoder.JSONDecodeError: Expecting property name")
    assert 'File "<python>", line 1' in await run(python, "1 +")


async def test_exit_status_is_reported(python: PythonTool) -> None:
    assert await run(python, "import sys\nsys.exit()") == ""
    assert await run(python, "raise SystemExit('no')") == "no\nended with exit status 1"
    assert await run(python, "import os\nprint('x', end='', flush=True)\nos._exit(3)") == "x\nended with exit status 3"


async def test_ordinary_programs_run(python: PythonTool) -> None:
    code = """
import asyncio, concurrent.futures, datetime, decimal, hashlib, os, random, shutil, sqlite3, ssl, tempfile, zoneinfo
async def f():
    await asyncio.sleep(0.01)
    return await asyncio.to_thread(lambda: 1)
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    print(sum(pool.map(abs, range(100))))
with tempfile.TemporaryFile() as file:
    file.write(b"x")
os.makedirs("a/b")
open("a/b/c", "w").write("text")
shutil.copyfile("a/b/c", "d")
shutil.rmtree("a")
print(os.listdir("."), sqlite3.connect("db").execute("select 1").fetchone(), random.random() < 1)
asyncio.run(f())
"""
    assert await run(python, code) == "4950\n['d'] (1,) True\n1\n"


async def test_calls_share_nothing(python: PythonTool) -> None:
    assert await run(python, "x = 1\nopen('file', 'w').write('x')") == "1\n"
    assert await run(python, "import os\nprint('x' in globals(), os.listdir('.'))") == "False []\n"


async def test_environment_is_empty(python: PythonTool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TROUPE_SECRET", "secret")
    assert await run(python, "import os\nprint(sorted(os.environ))") == "['HOME', 'LANG', 'PATH']\n"
    assert "No module named 'pydantic'" in await run(python, "import pydantic")
    assert "No module named 'runtime'" in await run(python, "import runtime.errors")


TRY = """
import ctypes, errno, os, socket
def attempt(function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        print(errno.errorcode[error.errno])
    else:
        print("done")
"""


async def test_no_socket_reaches_anything(python: PythonTool) -> None:
    name = f"\0troupe-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as local:
        local.bind(name)
        local.listen()
        code = f"""{TRY}
attempt(lambda: socket.create_connection({tcp.getsockname()!r}))
attempt(lambda: socket.socket(socket.AF_UNIX).connect({name!r}))
attempt(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
attempt(socket.socketpair, socket.AF_UNIX, socket.SOCK_DGRAM)
here, there = socket.socketpair()
for number in (42, 49, 50):  # connect, bind, listen
    print(ctypes.CDLL(None, use_errno=True).syscall(number, here.fileno(), b"", 0), errno.errorcode[ctypes.get_errno()])
"""
        assert await run(python, code) == "EPERM\n" * 4 + "-1 EPERM\n" * 3


FORBIDDEN = {
    "fork": 57, "vfork": 58, "execve": 59, "tkill": 200, "ptrace": 101, "mount": 165, "pivot_root": 155, "chroot": 161,
    "unshare": 272, "setns": 308, "bpf": 321, "perf_event_open": 298, "keyctl": 250, "add_key": 248, "kexec_load": 246,
    "process_vm_readv": 310, "process_vm_writev": 311, "io_uring_setup": 425, "pidfd_open": 434, "memfd_create": 319,
    "userfaultfd": 323, "setsid": 112, "setuid": 105, "shmget": 29, "mq_open": 240, "open_by_handle_at": 304,
    "fsopen": 430, "seccomp": 317, "init_module": 175, "reboot": 169, "rt_sigqueueinfo": 129,
}  # fmt: skip


async def test_forbidden_system_calls_fail(python: PythonTool) -> None:
    code = f"""
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
for name, number in {FORBIDDEN!r}.items():
    result = libc.syscall(number, 0, 0, 0, 0, 0)
    if result != -1 or ctypes.get_errno() != errno.EPERM:
        print(name, result, ctypes.get_errno())
for flags in (17, 0x10000000 | 0x10f00, 0x10000000 | 17):  # a process; a thread and a process in a new user namespace
    print(libc.syscall(56, flags, 0, 0, 0, 0), errno.errorcode[ctypes.get_errno()])
print(libc.syscall(435, 0, 0), errno.errorcode[ctypes.get_errno()])  # clone3
print(libc.syscall(0x40000000 | 39), errno.errorcode[ctypes.get_errno()])  # getpid in the x32 ABI
print(libc.prctl(1, 0), errno.errorcode[ctypes.get_errno()])  # no longer die with the parent
print(libc.fcntl(1, 8, 1), errno.errorcode[ctypes.get_errno()])  # F_SETOWN
"""
    assert await run(python, code) == "-1 EPERM\n" * 3 + "-1 ENOSYS\n" * 2 + "-1 EPERM\n" * 2


async def test_system_calls_of_32_bits_end_the_process(python: PythonTool) -> None:
    code = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid); int 0x80; ret
print("before", flush=True)
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())
"""
    output = await run(python, code)
    assert output.startswith("before\nended by SIG")


async def test_other_processes_cannot_be_signalled(python: PythonTool) -> None:
    code = f"""{TRY}
for pid in (os.getppid(), {os.getpid()}, 1, 0, -1):
    attempt(os.kill, pid, 9)
attempt(os.killpg, 0, 9)
"""
    assert await run(python, code) == "EPERM\n" * 6
    assert await run(python, "import os\nos.kill(os.getpid(), 9)") == "ended by SIGKILL"


async def test_files_of_the_machine_cannot_be_read(python: PythonTool, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the token")
    secret.chmod(0o644)
    paths = [
        str(secret),
        "/etc/shadow",
        "/etc/passwd",
        "/proc/self/environ",
        "/proc/self/mem",
        "/proc/1",
    ]
    code = f"""{TRY}
for path in {[*paths, str(ROOT / "pyproject.toml"), "/dev/mem", "/sys/kernel", "/var", "/tmp"]!r}:
    attempt(os.open, path, os.O_RDONLY)
"""
    output = await run(python, code)
    assert set(output.split()) <= {"ENOENT", "EACCES"}
    assert len(output.split()) == len(paths) + 5


async def test_home_shows_at_most_the_way_to_python(python: PythonTool) -> None:
    code = f"{TRY}\nattempt(lambda: print(*os.listdir({str(Path.home())!r})))"
    output = set((await run(python, code)).split())
    assert output <= {"EACCES", "ENOENT", "done", *Path(sys.base_prefix).parts}


async def test_only_the_own_folder_can_be_written(python: PythonTool, tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o777)  # noqa: PTH101  ruff takes Path.chmod for a slow call
    code = f"""{TRY}
import sys, sysconfig
for folder in ({str(tmp_path)!r}, "/tmp", "/", "/dev/shm", "/usr/lib", sysconfig.get_path("stdlib"), ".."):
    attempt(os.open, f"{{folder}}/new", os.O_WRONLY | os.O_CREAT)
attempt(os.open, os.__file__, os.O_RDWR)
attempt(os.open, "/proc/self/mem", os.O_RDWR)
attempt(os.chmod, os.__file__, 0o777)
attempt(os.truncate, os.__file__, 0)
attempt(os.link, os.__file__, "link")
attempt(os.symlink, "/etc/shadow", "symbolic")
attempt(os.open, "symbolic", os.O_RDONLY)
attempt(os.mknod, "device", 0o20600, os.makedev(1, 1))
"""
    *refused, symlink, opened, device = (await run(python, code)).split()
    assert set(refused) <= {"ENOENT", "EACCES", "EPERM", "EROFS", "EXDEV"}
    assert len(refused) == 12
    assert symlink == "done"
    assert opened in ("ENOENT", "EACCES")
    assert device in ("EPERM", "EACCES")
    assert os.listdir(tmp_path) == []  # noqa: PTH208  as above


async def test_folders_that_are_nested_without_end_are_deleted(python: PythonTool) -> None:
    code = "import os\nfor _ in range(1200):\n    open('a', 'w').close()\n    os.mkdir('b')\n    os.chdir('b')"
    assert await run(python, code) == ""


async def test_folder_that_cannot_be_listed_is_deleted(python: PythonTool) -> None:
    code = "import os\nos.mkdir('a')\nopen('a/b', 'w').close()\nos.symlink('/etc', 'a/etc')\nos.mkdir('c', 0)"
    assert await run(python, code) == ""


async def test_file_size_is_limited(layers: Protections) -> None:
    async with checked(PythonTool.Options(timeout_s=LONG_S, file_max_bytes=ByteSize(1 << 20))) as python:
        code = (
            f"{TRY}\nattempt(lambda: open('big', 'wb', 0).write(bytes(1 << 20)) and open('big', 'ab', 0).write(b'x'))"
        )
        assert await run(python, code) in ("EFBIG\n", "ENOSPC\n")
        if layers.namespaces:
            code = f"{TRY}\nfor i in range(3):\n    attempt(lambda: open(str(i), 'wb').write(bytes(600_000)))"
            assert await run(python, code) == "done\nENOSPC\nENOSPC\n"


async def test_memory_bomb_is_a_memory_error(python: PythonTool) -> None:
    assert (await run(python, "x = bytearray(1 << 30)")).endswith("MemoryError\n")
    output = await run(python, "x = []\nwhile True:\n    x.append(bytearray(1 << 20))")
    assert output.endswith("MemoryError\n") or "ended by SIG" in output


async def test_deep_recursion(python: PythonTool) -> None:
    assert (await run(python, "def f():\n    f()\nf()")).endswith("RecursionError: maximum recursion depth exceeded\n")
    code = "import ctypes\nf = ctypes.CFUNCTYPE(None)(lambda: f())\nimport sys\nsys.setrecursionlimit(10**9)\nf()"
    output = await run(python, code)
    assert "ended by SIG" in output or "MemoryError" in output


async def test_segmentation_fault_is_reported(python: PythonTool) -> None:
    output = await run(python, "import ctypes\nprint('x', flush=True)\nctypes.string_at(0)")
    assert output == "x\nended by SIGSEGV: the stack is full, or native code failed"


async def test_processes_cannot_be_started(python: PythonTool) -> None:
    code = f"""{TRY}
import subprocess, sys
attempt(os.fork)
attempt(subprocess.run, ["/bin/true"])
attempt(os.posix_spawn, sys.executable, [sys.executable], {{}})
attempt(os.execv, sys.executable, [sys.executable])
"""
    output = (await run(python, code)).split()
    assert len(output) == 4
    assert set(output) <= {"EPERM", "EACCES", "ENOENT"}


async def test_threads_are_limited(layers: Protections) -> None:
    code = """
import threading
count, go = 0, threading.Event()
try:
    while count < 10_000:
        threading.Thread(target=go.wait).start()
        count += 1
except RuntimeError:
    print(count)
go.set()
"""
    async with checked(PythonTool.Options(timeout_s=LONG_S, threads=8)) as python:
        count = int(await run(python, code))
        assert 5 <= count <= 8 if layers.namespaces else 5 <= count < 10_000


STUCK = {
    "sleeps": "import time\ntime.sleep(1000)",
    "computes": "while True: pass",
    "catches everything": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "thread that never ends": "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()",
    "ignores signals": (
        "import signal, time\n"
        "for s in set(signal.Signals) - {9, 19}:\n    signal.signal(s, signal.SIG_IGN)\n"
        "time.sleep(1000)"
    ),
    "closes all files": "import os, time\nos.closerange(0, 1000)\ntime.sleep(1000)",
    "stops itself": "import os\nos.kill(os.getpid(), 19)",
}


@pytest.mark.parametrize("code", STUCK.values(), ids=list(STUCK))
async def test_time_limit(layers: Protections, code: str) -> None:
    async with checked(PythonTool.Options(timeout_s=1)) as python:
        assert await run(python, code) == "ended after 1 s: the time limit"


async def test_cpu_time_is_limited_too(layers: Protections) -> None:
    async with checked(PythonTool.Options(timeout_s=LONG_S)) as python:
        code = "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass"
        assert (await run(python, code)).startswith("ended by SIGKILL")
        assert f"{LONG_S + 1}, {LONG_S + 2}" in await run(
            python, "import resource\nresource.getrlimit(resource.RLIMIT_CPU)"
        )


async def test_long_output_is_cut(python: PythonTool) -> None:
    output = await run(python, "print('x' * 10_000)")
    assert output == "x" * 8192 + "\n... 1809 more bytes were cut"


async def test_endless_output_ends_the_code_and_takes_no_memory_here(python: PythonTool) -> None:
    before_bytes = psutil.Process().memory_info().rss
    output = await run(python, "while True: print('spam' * 10_000)")
    assert output.splitlines()[-1].endswith("bytes of output: the output limit")
    assert len(output) < 9000
    assert psutil.Process().memory_info().rss - before_bytes < 64 << 20


async def test_output_that_nobody_reads_does_not_hold_up_the_end(
    layers: Protections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(python_tool, "_FLOOD_BYTES", 1)
    async with checked(PythonTool.Options(timeout_s=LONG_S)) as python, asyncio.timeout(2 * LONG_S):
        for _ in range(10):
            assert (await run(python, "import os\nwhile True: os.write(1, bytes(1 << 20))")).endswith(
                "the output limit"
            )


async def test_rubbish_is_text(python: PythonTool) -> None:
    assert await run(python, "import os\n_ = os.write(1, b'\\xff\\n')\nprint('\\ud800')") == "\ufffd\n\\ud800\n"
    assert "null bytes" in await run(python, "x\0y")
    assert "SyntaxError" in await run(python, "(" * 300)


async def test_cancelled_call_ends_its_processes(layers: Protections) -> None:
    before = below(os.getpid())
    async with checked(PythonTool.Options(timeout_s=LONG_S)) as python:
        call = asyncio.create_task(run(python, "import time\ntime.sleep(1000)"))
        await until(lambda: len(below(os.getpid()) - before) >= 2)
        started = below(os.getpid()) - before
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await all_end(started)


@pytest.mark.parametrize("processes", [0, 1, 2])
async def test_leaving_ends_running_calls_and_refuses_further_ones(layers: Protections, processes: int) -> None:
    before = below(os.getpid())
    async with checked(PythonTool.Options(timeout_s=LONG_S)) as python:
        calls = [
            asyncio.create_task(run(python, "import time\ntime.sleep(1000)")) for _ in range(2 * python_tool.CALLS)
        ]
        await until(lambda: len(below(os.getpid()) - before) >= processes)
    assert below(os.getpid()) == before
    done, _ = await asyncio.wait(calls, timeout=LONG_S)
    assert done == set(calls)
    assert all(call.exception() or "SIGKILL" in call.result() for call in calls)
    with pytest.raises(ToolError, match="the runtime is stopping"):
        await run(python, "1")


async def test_code_ends_if_the_runtime_is_killed(layers: Protections, tmp_path: Path) -> None:
    program = f"""
import asyncio
from runtime.tools import python_tool
from runtime.tools.sandbox.protections import Protections
python_tool.detect = lambda: {layers!r}
async def main():
    async with python_tool.PythonTool(python_tool.PythonTool.Options(timeout_s={LONG_S})) as python:
        await python.call({{"code": "import time; time.sleep(1000)"}})
asyncio.run(main())
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # a killed runtime leaves the folder behind
    runtime = await asyncio.create_subprocess_exec(sys.executable, "-c", program, cwd=ROOT, env=environment)
    await until(lambda: len(below(runtime.pid)) >= 2 + layers.namespaces)
    processes = below(runtime.pid)
    runtime.send_signal(signal.SIGKILL)
    await runtime.wait()
    await all_end(processes)


async def test_machine_that_cannot_isolate_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Protections(namespaces=False, landlock=False, faults=("unshare: Operation not permitted",))
    monkeypatch.setattr(python_tool, "detect", lambda: found)
    assert "needs Linux on x86-64 with seccomp" in (PythonTool.fault() or "")
    with pytest.raises(ToolError, match="unshare: Operation not permitted"):
        async with PythonTool():
            pass
    with pytest.raises(ToolError, match="unshare: Operation not permitted"):
        await run(PythonTool(), "1")


async def test_failed_setup_does_not_run_the_code(layers: Protections) -> None:
    tool = PythonTool(
        PythonTool.Options.model_construct(**{**PythonTool.Options().model_dump(), "memory_bytes": 1 << 99})
    )
    with pytest.raises(ToolError, match="the sandbox could not be set up: OverflowError"):
        await run(tool, "print('ran')")
