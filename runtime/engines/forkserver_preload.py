"""Imported once by the forkserver, before any engine is forked: the guards first, then everything an engine needs."""

import ctypes
import gc
import os
import signal
from pathlib import Path

from runtime.engines.forkserver import LOG_VARIABLE, PARENT_VARIABLE

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)
_forking_pid = 0


def note_parent() -> None:
    """Before a fork: who the new process's parent is."""
    global _forking_pid  # noqa: PLW0603 (what is noted here is read on the other side of the fork)
    _forking_pid = os.getpid()


def die_with(parent_pid: int) -> None:
    """Be killed when the parent ends, or end when it already has."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


# The forkserver looks at its parent's pipe once all is imported. Until then the kernel watches; not longer, as it
# watches the parent's thread and not its process.
die_with(int(os.environ[PARENT_VARIABLE]))
with Path(os.environ[LOG_VARIABLE]).open("ab") as _log:
    os.dup2(_log.fileno(), 1)
    os.dup2(_log.fileno(), 2)
os.setpgid(0, 0)  # the terminal's Ctrl-C is for the parent, which then closes its engines in order
os.register_at_fork(before=note_parent, after_in_child=lambda: die_with(_forking_pid))

gc.disable()  # nothing that is imported is garbage

from vllm.platforms import current_platform  # noqa: E402

import runtime.engines.elastic.executor  # noqa: E402
import runtime.engines.elastic.scheduler  # noqa: E402

if current_platform.is_cpu():
    import runtime.engines.elastic.cpu_worker  # noqa: F401

gc.freeze()  # vLLM collects garbage as it starts: a second for each engine, were all of this gone through again
gc.enable()
_libc.prctl(PR_SET_PDEATHSIG, 0)
