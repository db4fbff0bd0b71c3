"""Who may do what: bearer tokens, kept as hashes in a file, each with what it may do."""

import hashlib
import json
import os
import secrets
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from agents.role import Value
from runtime.errors import ConfigError, Forbidden

PREFIX = "troupe-"


class Scope(StrEnum):
    """What a token may: read what is there; submit jobs and requests; control engines, policies and others' jobs."""

    READ = "read"
    SUBMIT = "submit"
    CONTROL = "control"


class Token(Value):
    """A token by its name; `sha256` of what its holder sends. It is random, so that a plain hash keeps it."""

    name: str
    sha256: str
    scopes: tuple[Scope, ...]


class _File(Value):
    tokens: tuple[Token, ...] = ()


class Tokens:
    """The tokens of a file. Without any, everybody may do everything: then the service is to listen on localhost alone.

    Read again whenever the file has changed, so that a token that is taken away opens nothing any more.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Token] = {}
        self._read_at: tuple[int, int] | None = None
        self.reload()

    def reload(self) -> Self:
        """Take note of what the file says now. Raises ConfigError."""
        try:
            status = self.path.stat()
            if (status.st_mtime_ns, status.st_size) != self._read_at:
                found = _File.model_validate_json(self.path.read_bytes())
                self._known = {token.sha256: token for token in found.tokens}
                self._read_at = (status.st_mtime_ns, status.st_size)
        except FileNotFoundError:
            self._known, self._read_at = {}, None
        except OSError as error:
            raise ConfigError(f"{self.path}: {error.strerror}") from None
        except ValidationError as error:
            raise ConfigError(f"{self.path}: not a file of tokens: {error.errors()[0]['msg']}") from None
        return self

    @property
    def all(self) -> tuple[Token, ...]:
        """Every token, without what its holder sends."""
        return tuple(self._known.values())

    def add(self, name: str, scopes: tuple[Scope, ...]) -> str:
        """A new token; what its holder is to send is returned here, and kept nowhere."""
        if any(token.name == name for token in self.all):
            raise ConfigError(f"{self.path}: there is a token {name!r} already")
        secret = PREFIX + secrets.token_urlsafe(32)
        self._write((*self.all, Token(name=name, sha256=_hash(secret), scopes=scopes)))
        return secret

    def remove(self, name: str) -> None:
        """Take a token away. Raises ConfigError where there is none of the name."""
        rest = tuple(token for token in self.all if token.name != name)
        if len(rest) == len(self.all):
            names = ", ".join(token.name for token in self.all) or "none"
            raise ConfigError(f"{self.path}: there is no token {name!r}; there are {names}")
        self._write(rest)

    def check(self, secret: str | None, scope: Scope) -> str:
        """The name of a token that may do this. Raises Forbidden."""
        self.reload()
        if not self._known:
            return "anybody"
        # Found by its hash: how long a lookup takes says nothing of what would be right.
        token = self._known.get(_hash(secret)) if secret else None
        if token is None:
            raise Forbidden("a token is needed: Authorization: Bearer troupe-...", known=False)
        if scope not in token.scopes:
            raise Forbidden(f"the token {token.name!r} may {', '.join(token.scopes)}; this needs {scope}", known=True)
        return token.name

    def _write(self, tokens: tuple[Token, ...]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, fresh = tempfile.mkstemp(prefix=".tokens-", dir=self.path.parent)  # read by its owner alone
            with os.fdopen(handle, "w") as file:
                json.dump(_File(tokens=tokens).model_dump(mode="json"), file, indent=1)
            Path(fresh).replace(self.path)
        except OSError as error:
            raise ConfigError(f"{self.path}: {error.strerror}") from None
        self.reload()


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
