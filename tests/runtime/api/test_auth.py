"""Tokens and the gate that checks them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runtime.api.auth import Gate, OpenAccess, Scope, Tokens
from runtime.errors import ConfigError, Forbidden


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "tokens.json"


def test_file_holds_hashes_and_is_readable_by_its_owner_only(path: Path) -> None:
    secret = Tokens(path).add("me", (Scope.READ,))
    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0


def test_gate_checks_the_scope_of_a_token(path: Path) -> None:
    secret = Tokens(path).add("me", (Scope.READ,))
    gate = Gate(Tokens(path), OpenAccess.NEVER)
    assert gate.token_name(secret) == "me"
    gate.check(secret, Scope.READ)
    with pytest.raises(Forbidden, match="'me' lacks the scope control; it has read"):
        gate.check(secret, Scope.CONTROL)


def test_token_names_are_unique(path: Path) -> None:
    Tokens(path).add("me", (Scope.READ,))
    with pytest.raises(ConfigError, match="a token named 'me' already exists"):
        Tokens(path).add("me", (Scope.READ,))


def test_token_that_another_process_removes_does_not_come_back(path: Path) -> None:
    Tokens(path).add("leaked", (Scope.READ,))
    adding, removing = Tokens(path), Tokens(path)
    removing.remove("leaked")
    adding.add("new", (Scope.READ,))
    assert [token.name for token in Tokens(path).all] == ["new"]


def test_tokens_that_are_added_at_once_are_all_stored(path: Path) -> None:
    names = [str(number) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: Tokens(path).add(name, (Scope.READ,)), names))
    assert sorted(token.name for token in Tokens(path).all) == sorted(names)


def test_removing_an_unknown_token_lists_the_existing_ones(path: Path) -> None:
    Tokens(path).add("me", (Scope.READ,))
    with pytest.raises(ConfigError, match="no token is named 'you'; existing tokens: me"):
        Tokens(path).remove("you")


def test_file_with_other_content_is_rejected(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("[]")
    with pytest.raises(ConfigError, match="not a valid token file"):
        Tokens(path)
