"""Programs of the system that tests drive for real; scripts/test.sh installs them where it can."""

import os
import shutil

import pytest

from scripts.mosquitto import PROGRAM as MOSQUITTO

__all__ = ["CHROMIUM", "MOSQUITTO", "needs"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def needs(program: str | None, name: str) -> pytest.MarkDecorator:
    """Skip a test that needs a program which is not there; but not in CI, where it has to be."""
    return pytest.mark.skipif(program is None and not os.environ.get("CI"), reason=f"{name} is not installed")
