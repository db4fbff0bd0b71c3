"""Bearer tokens: the file that stores their hashes, and the gate that checks each request's token and scope."""

import fcntl
import hashlib
import json
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from agents.role import Value
from runtime.errors import ConfigError, Forbidden

PREFIX = "troupe-"


class Scope(StrEnum):
    """A permission that a token grants.

    READ: read jobs, events, engines, decisions and metrics.
    SUBMIT: submit and cancel jobs, and send requests to OpenAI's and Anthropic's APIs.
    CONTROL: pin engines, pause the controller and change its policy.
    """

    READ = "read"
    SUBMIT = "submit"
    CONTROL = "control"


class Token(Value):
    """A stored token: its name, the SHA-256 hash of its secret, and its scopes.

    The secret is random, so an unsalted hash protects it.
    """

    name: str
    sha256: str
    scopes: tuple[Scope, ...]


class _File(Value):
    tokens: tuple[Token, ...] = ()


class Tokens:
    """The tokens in a file. A missing file has no tokens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._by_sha256: dict[str, Token] = {}
        self._version: tuple[int, ...] | None = None
        self.reload()

    def reload(self) -> Self:
        """Read the file again if it has changed, so that removed tokens stop working.

        Raises ConfigError if the file cannot be read or is not a valid token file. All tokens are forgotten then.
        """
        try:
            status = self.path.stat()
            version = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
            if version != self._version:
                self._forget()
                stored = _File.model_validate_json(self.path.read_bytes())
                self._by_sha256 = {token.sha256: token for token in stored.tokens}
                self._version = version
        except FileNotFoundError:
            self._forget()
        except OSError as error:
            self._forget()
            raise ConfigError(
                f"{self.path}: cannot read the token file: {error.strerror}; it must be a regular file that this user"
                " can read"
            ) from None
        except ValidationError as error:
            raise ConfigError(
                f"{self.path}: not a valid token file: {error.errors()[0]['msg']}; restore it, or delete it and create"
                " new tokens with `troupe tokens add NAME`"
            ) from None
        return self

    def _forget(self) -> None:
        self._by_sha256, self._version = {}, None

    def find(self, secret: str | None) -> Token | None:
        """Return the token with this secret as of the last `reload`, or None."""
        # Looking up the hash, not the secret, keeps the lookup's duration from revealing anything about valid secrets.
        return self._by_sha256.get(_hash(secret)) if secret else None

    @property
    def all(self) -> tuple[Token, ...]:
        """Return all tokens, without their secrets."""
        return tuple(self._by_sha256.values())

    def add(self, name: str, scopes: tuple[Scope, ...]) -> str:
        """Create a token and return its secret, which is not stored.

        Raises ConfigError if the name is taken or the file cannot be written.
        """
        with self._locked():
            if any(token.name == name for token in self.all):
                raise ConfigError(
                    f"{self.path}: a token named {name!r} already exists; choose another name or remove it"
                )
            secret = PREFIX + secrets.token_urlsafe(32)
            self._write((*self.all, Token(name=name, sha256=_hash(secret), scopes=scopes)))
            return secret

    def remove(self, name: str) -> None:
        """Delete a token. Raises ConfigError if no token has this name or the file cannot be written."""
        with self._locked():
            remaining = tuple(token for token in self.all if token.name != name)
            if len(remaining) == len(self.all):
                names = ", ".join(token.name for token in self.all) or "none"
                raise ConfigError(f"{self.path}: no token is named {name!r}; existing tokens: {names}")
            self._write(remaining)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from changing the tokens, which are those that the last one has left.

        The lock is on a file beside, because each change replaces the file of tokens. Raises ConfigError.
        """
        lock = self.path.with_name(f"{self.path.name}.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(lock, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"{lock}: cannot lock the token file: {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            self.reload()
            yield
        finally:
            os.close(handle)

    def _write(self, tokens: tuple[Token, ...]) -> None:
        try:
            handle, temporary = tempfile.mkstemp(prefix=".tokens-", dir=self.path.parent)  # readable by its owner only
            with os.fdopen(handle, "w") as file:
                json.dump(_File(tokens=tokens).model_dump(mode="json"), file, indent=1)
            Path(temporary).replace(self.path)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot write the token file: {error.strerror}") from None
        self.reload()


class OpenAccess(StrEnum):
    """A rule for requests without a token while the service has no tokens: accept them or not."""

    ALWAYS = "always"
    UNTIL_FIRST_TOKEN = "until the first token"
    NEVER = "never"


class Gate:
    """A check of every request's token against the token file.

    If tokens exist, a request needs one of them. If none exists, `open_access` decides. Once a gate has seen a token,
    it stays closed after the last token is gone, unless `open_access` is ALWAYS: losing the file must not open a
    service that its owner had locked. While the file cannot be read, the gate rejects every request.
    """

    def __init__(self, tokens: Tokens, open_access: OpenAccess) -> None:
        self._tokens = tokens
        self._open_access = open_access
        self._fault: str | None = None
        self._reload()

    def token_name(self, secret: str | None) -> str | None:
        """Return the name of the token with this secret, or None if no token has it."""
        self._reload()
        token = self._tokens.find(secret)
        return token.name if token else None

    def check(self, secret: str | None, scope: Scope) -> None:
        """Raise Forbidden unless the token with this secret has this scope."""
        self._reload()
        if self._fault is not None:
            raise Forbidden(
                "the service cannot read its token file, so it rejects every request; its log names the file and the"
                " problem",
                known=True,
            )
        if not self._tokens.all:
            if self._open_access is OpenAccess.NEVER:
                raise Forbidden(
                    "this service has no tokens and rejects requests without one; its owner can create one with"
                    " `troupe tokens add NAME`",
                    known=False,
                )
            return
        token = self._tokens.find(secret)
        if token is None:
            raise Forbidden(
                "a valid token is required; send it in the header `Authorization: Bearer troupe-...`", known=False
            )
        if scope not in token.scopes:
            raise Forbidden(
                f"the token {token.name!r} lacks the scope {scope}; it has {', '.join(token.scopes)}",
                known=True,
            )

    def _reload(self) -> None:
        """Read the file again if it has changed. Log a fault once, not at every request."""
        fault = None
        try:
            self._tokens.reload()
        except ConfigError as error:
            fault = str(error)
        if fault != self._fault:
            logging.getLogger(__name__).error("tokens: %s", fault or f"{self._tokens.path} is readable again")
            self._fault = fault
        if self._tokens.all and self._open_access is OpenAccess.UNTIL_FIRST_TOKEN:
            self._open_access = OpenAccess.NEVER


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
