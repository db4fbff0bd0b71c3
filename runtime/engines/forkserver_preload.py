"""The forkserver imports this module once, before it forks any engine.

The module first ties the process to its parent and redirects its output, then imports everything that an engine needs.
"""

import ctypes
import gc
import os
import signal
from pathlib import Path

import setproctitle

from runtime.engines.forkserver import LOG_VARIABLE, PARENT_VARIABLE

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)
_forking_pid = 0


def note_parent() -> None:
    """Note, before a fork, the process id that will be the child's parent."""
    global _forking_pid  # noqa: PLW0603 (the child reads it after the fork)
    _forking_pid = os.getpid()


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends. Exit if the parent has already ended."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


# The forkserver watches its parent's pipe only after these imports. Until then the kernel watches the parent. It is
# relieved at the end, because PR_SET_PDEATHSIG watches the parent's thread rather than its process.
die_with(int(os.environ[PARENT_VARIABLE]))
with Path(os.environ[LOG_VARIABLE]).open("ab") as _log:
    os.dup2(_log.fileno(), 1)
    os.dup2(_log.fileno(), 2)
os.setpgid(0, 0)  # the terminal's Ctrl-C must reach the parent only, which then closes its engines
os.register_at_fork(before=note_parent, after_in_child=lambda: die_with(_forking_pid))

gc.disable()  # imported modules contain no garbage

# vLLM gives every engine the title VLLM::EngineCore. The memory for titles is found at the first call, and only before
# the first environment variable changes. Importing vLLM changes some, and with Ray any of them can be the first.
setproctitle.getproctitle()

from vllm.platforms import current_platform  # noqa: E402

import runtime.engines.elastic.executor  # noqa: E402
import runtime.engines.elastic.scheduler  # noqa: E402

if current_platform.is_cpu():
    # Every engine imports this when it loads a model, which takes 0.2 s.

    import runtime.engines.elastic.cpu_worker  # noqa: F401

    # Every engine registers these, which searches all modules and takes 0.2 s. It inherits them now.
    current_platform.register_triton_kernel_overrides()
    type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)

gc.freeze()  # vLLM collects garbage at start, which would cost a second per engine with these modules included
gc.enable()
_libc.prctl(PR_SET_PDEATHSIG, 0)
