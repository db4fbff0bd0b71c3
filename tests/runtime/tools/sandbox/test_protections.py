import os

import pytest

from runtime.tools.sandbox import jail
from runtime.tools.sandbox.protections import Protections, detect


def test_best_layers_of_this_machine_are_found_and_described() -> None:
    found = detect()
    text = "\n".join(found.sentences())
    assert ("network namespace" in text) == found.namespaces
    assert ("Landlock" in text) == (found.landlock or not found.suffices)
    assert detect() is found


def test_sentences_name_what_is_missing() -> None:
    weaker = "\n".join(Protections(namespaces=False, landlock=True).sentences())
    assert "not limited: threads" in weaker
    assert "not hidden" in weaker
    assert Protections(False, False, ("no seccomp",)).sentences() == (
        "nothing: the sandbox does not work here (no seccomp)",
    )


def test_machine_without_any_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jail, "_BOOT", "import sys; sys.exit('unshare: Operation not permitted')")
    assert detect.__wrapped__() == Protections(False, False, ("unshare: Operation not permitted",))


def test_launcher_whose_parent_is_another_process_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert detect.__wrapped__().faults == ("the runtime ended",)
