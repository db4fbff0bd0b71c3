import os

import pytest

from runtime.tools.sandbox import jail
from runtime.tools.sandbox.protections import Protections, detect


def test_this_machine_is_tried_once() -> None:
    assert detect() is detect()


def test_machine_without_any_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jail, "_BOOT", "import sys; sys.exit('unshare: Operation not permitted')")
    assert detect.__wrapped__() == Protections(False, False, ("unshare: Operation not permitted",))


def test_launcher_whose_parent_is_another_process_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert detect.__wrapped__().faults == ("the runtime ended",)
