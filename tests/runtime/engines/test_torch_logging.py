"""PyTorch's log records go to the program's own log file."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import logging
import sys
from pathlib import Path

from runtime import logs

logs.log_to(Path(sys.argv[1]))
from runtime.engines import torch_logging

torch_logging.propagate()
for name in ("torch", "torch.utils.cpp_extension", "torch._dynamo.eval_frame"):
    logging.getLogger(name).warning("No CUDA runtime is found")
"""


def test_pytorch_warnings_reach_the_log_file_once_and_not_stderr(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")
    logged = [line.split(" ", 2)[2] for line in (tmp_path / "troupe.log").read_text().splitlines()]
    assert logged == [
        f"WARNING {name}: No CUDA runtime is found"
        for name in ("torch", "torch.utils.cpp_extension", "torch._dynamo.eval_frame")
    ]
