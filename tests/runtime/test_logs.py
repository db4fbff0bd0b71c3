"""Commands log no secrets."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from pathlib import Path
import httpx2
from runtime import logs

logs.log_to(Path(sys.argv[1]))
with httpx2.Client(transport=httpx2.MockTransport(lambda request: httpx2.Response(200))) as client:
    client.get("https://tools.example/mcp?apiKey=SECRET")
"""


def test_urls_with_keys_are_not_logged(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], check=True)
    assert "SECRET" not in (tmp_path / "troupe.log").read_text()
