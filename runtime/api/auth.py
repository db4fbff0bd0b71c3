"""Who may do what: bearer tokens, kept as hashes in a file, each with what it may do."""

import hashlib
import json
import logging
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
    """The tokens of a file. A file that is missing has none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Token] = {}
        self._read_at: tuple[int, ...] | None = None
        self.reload()

    def reload(self) -> Self:
        """Read the file if it has changed, so that a removed token opens nothing any more.

        Raises ConfigError if the file cannot be read or holds something else; no token is known then.
        """
        try:
            status = self.path.stat()
            version = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
            if version != self._read_at:
                self._forget()
                found = _File.model_validate_json(self.path.read_bytes())
                self._known = {token.sha256: token for token in found.tokens}
                self._read_at = version
        except FileNotFoundError:
            self._forget()
        except OSError as error:
            self._forget()
            raise ConfigError(f"{self.path}: {error.strerror}; it has to be a file that this user can read") from None
        except ValidationError as error:
            raise ConfigError(
                f"{self.path}: not a file of tokens: {error.errors()[0]['msg']}; restore it, or remove it and make new"
                " tokens with `troupe tokens add NAME`"
            ) from None
        return self

    def _forget(self) -> None:
        self._known, self._read_at = {}, None

    def find(self, secret: str | None) -> Token | None:
        """Return the token whose holder sends this secret, as of the last `reload`."""
        # Found by its hash: how long a lookup takes says nothing of what would be right.
        return self._known.get(_hash(secret)) if secret else None

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


class Unguarded(StrEnum):
    """Whether a service without tokens admits everybody."""

    ALWAYS = "always"
    UNTIL_A_TOKEN = "until there was a token"
    NEVER = "never"


class Gate:
    """Decides at every request who may do what.

    If there are tokens, a request needs one of them. If there is none, `unguarded` decides. A gate that has seen a
    token stays shut after the last one is gone, unless `unguarded` is ALWAYS: a lost file must not open what its owner
    had locked. A file that cannot be read lets nobody in.
    """

    def __init__(self, tokens: Tokens, unguarded: Unguarded) -> None:
        self._tokens = tokens
        self._unguarded = unguarded
        self._fault: str | None = None
        self._reload()

    def name(self, secret: str | None) -> str | None:
        """Return the name of the token with this secret, None if there is no such token."""
        self._reload()
        token = self._tokens.find(secret)
        return token.name if token else None

    def check(self, secret: str | None, scope: Scope) -> None:
        """Raise Forbidden unless the holder of this secret has this scope."""
        self._reload()
        if self._fault is not None:
            raise Forbidden(
                "the service cannot read its file of tokens, so nobody is let in; its log names the file and what is"
                " wrong with it",
                known=True,
            )
        if not self._tokens.all:
            if self._unguarded is Unguarded.NEVER:
                raise Forbidden(
                    "this service has no token, and lets nobody in without one; its owner makes one with `troupe tokens"
                    " add NAME`",
                    known=False,
                )
            return
        token = self._tokens.find(secret)
        if token is None:
            raise Forbidden("a token is needed: Authorization: Bearer troupe-...", known=False)
        if scope not in token.scopes:
            raise Forbidden(f"the token {token.name!r} may {', '.join(token.scopes)}; this needs {scope}", known=True)

    def _reload(self) -> None:
        """Read the file if it has changed; log a fault once, not at every request."""
        fault = None
        try:
            self._tokens.reload()
        except ConfigError as error:
            fault = str(error)
        if fault != self._fault:
            logging.getLogger(__name__).error("tokens: %s", fault or f"{self._tokens.path} can be read again")
            self._fault = fault
        if self._tokens.all and self._unguarded is Unguarded.UNTIL_A_TOKEN:
            self._unguarded = Unguarded.NEVER


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
