"""The forkserver, with a light module preloaded instead of vLLM."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, signal, sys, threading, time
from pathlib import Path
from runtime.engines import forkserver

forkserver.PRELOAD = "json"
forkserver.start(Path(sys.argv[1]) / "engines.log", 1)
context = forkserver.context()
for _ in range(20):
    process = context.Process(target=time.sleep, args=(600,))
    process.start()
    codes = []
    readers = [threading.Thread(target=lambda: (process.join(), codes.append(process.exitcode))) for _ in range(8)]
    for reader in readers:
        reader.start()
    os.kill(process.pid, signal.SIGKILL)
    for reader in readers:
        reader.join()
    assert codes == [-signal.SIGKILL] * 8, codes
"""


def test_every_thread_reads_the_exit_code_under_a_long_tmpdir(tmp_path: Path) -> None:
    temporary = tmp_path / ("long" * 30)
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, check=True, timeout=300)
