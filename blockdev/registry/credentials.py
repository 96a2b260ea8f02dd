# SPDX-License-Identifier: Apache-2.0
"""Where a registry's credentials come from: Docker's config.json, auth.json, credential helpers.

A Provider says where to look, not what was found: it travels over the control socket, so that the
owner can look again when a credential was rejected or has expired. Nothing is cached here and
nothing is logged; no message or repr holds a secret.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from blockdev.control import member
from blockdev.errors import AccessDenied, BlockdevError, SourceError, UsageError, shortage

AUTH_FILE_VARIABLE = "REGISTRY_AUTH_FILE"
DOCKER_CONFIG_VARIABLE = "DOCKER_CONFIG"
FILE_SIZE_MAX = 1 << 20  # a config.json with a thousand logins is a tenth of it
HELPER_SECONDS = 10.0  # cloud helpers make a round trip of their own
HELPER_OUTPUT_MAX = 64 << 10  # tokens of cloud registries are a few KiB
_DOCKER_HUB_KEY = "https://index.docker.io/v1/"  # the name Docker gave to its own registry in 2013
_DOCKER_HUB_HOSTS = {"docker.io", "index.docker.io", "registry-1.docker.io"}
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TOKEN_USER = "<token>"  # a helper's way to say that the secret is an identity token
_NOT_FOUND = "credentials not found in native keychain"  # the helper protocol's words for "none"


class LoginUnknown(SourceError):
    """What to log in with cannot be had now, which says nothing of the registry, nor of others' logins. `host`: where
    it was asked for."""


@dataclass(frozen=True)
class Credential:
    """A login. With an identity token, that is exchanged for tokens and the password is not used."""

    username: str
    password: str = field(repr=False)
    identity_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """The value of a Basic Authorization header."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


@dataclass(frozen=True)
class Provider:
    """Where one caller's credentials are.

    `files` are read in order; those in `required` must exist. `environment` is what helpers run
    in: it may hold secrets, so a Provider is for memory and the control socket, never for a disk.
    """

    files: tuple[str, ...] = ()
    required: bool = False
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> Provider:
        """$REGISTRY_AUTH_FILE alone if it is set; else $DOCKER_CONFIG/config.json or ~/.docker/config.json."""
        chosen = environment.get(AUTH_FILE_VARIABLE)
        if chosen:
            return cls((str(Path(chosen).absolute()),), True, dict(environment))
        home = environment.get("HOME") or str(Path.home())
        folder = environment.get(DOCKER_CONFIG_VARIABLE) or f"{home}/.docker"
        return cls((str(Path(folder).absolute() / "config.json"),), False, dict(environment))

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Provider:
        """What to_json() was."""
        files, environment = member(document, "files", list), member(document, "environment", dict)
        if not all(isinstance(value, str) for value in (*files, *environment.values())):
            raise UsageError("asking the owner failed: credentials: files and environment are text")
        return cls(tuple(files), member(document, "required", bool), environment)

    def to_json(self) -> dict[str, Any]:
        """For the control socket."""
        return {"files": list(self.files), "required": self.required, "environment": dict(self.environment)}

    def find(self, registry: str, repository: str) -> Iterator[Credential]:
        """Credentials for a repository, best first: the host's helper, the store, then stored logins.

        Looks anew at every call, and only as far as the caller iterates. AccessDenied if a file or a
        helper cannot be used: going on without would be somebody else's login, or none. LoginUnknown if
        a helper fails: what it asks for us may be back soon, so readers wait as their policy says.
        """
        for path in self.files:
            config = _read(path, required=self.required)
            yield from self._from_config(config, path, registry, repository)

    def _from_config(self, config: dict[str, Any], path: str, registry: str, repository: str) -> Iterator[Credential]:
        helpers = _section(config, "credHelpers", path)
        host = _normal(registry)
        by_host = {_normal(key): name for key, name in helpers.items()}
        for name in (by_host.get(host), config.get("credsStore")):
            if name:
                found = self._ask(name, _DOCKER_HUB_KEY if host == "docker.io" else registry, path)
                if found:
                    yield found
        logins = {_normal(key): login for key, login in _section(config, "auths", path).items()}
        for scope in _scopes(host, repository):
            if scope in logins and (login := _login(logins[scope], path, scope)):
                yield login
                return

    def _ask(self, name: object, server: str, path: str) -> Credential | None:
        """Run a helper's `get`. Its output never goes into a message: it may hold a secret."""
        if not isinstance(name, str) or not _HELPER_NAME.fullmatch(name):
            raise AccessDenied(f"reading credentials failed: {path}: a credential helper's name is malformed")
        program = f"docker-credential-{name}"
        failed = f"asking {program} for credentials failed: {server}"
        found = shutil.which(program, path=self.environment.get("PATH", os.defpath))
        if not found:
            raise AccessDenied(f"{failed}: no such program in PATH")
        try:
            status, output = _run([found, "get"], server.encode(), dict(self.environment))
        except TimeoutError:
            raise LoginUnknown(f"{failed}: no answer within {HELPER_SECONDS:g} s", host=program) from None
        except OSError as error:
            raise _refusal(failed, error, program) from None
        if len(output) > HELPER_OUTPUT_MAX:
            raise AccessDenied(f"{failed}: its answer has more than {HELPER_OUTPUT_MAX} bytes")
        if status != 0:
            if output.strip().decode(errors="replace") == _NOT_FOUND:
                return None
            raise LoginUnknown(f"{failed}: it ended with status {status}", host=program)
        return _answer(output, failed)


def _refusal(failed: str, error: OSError, asked: str) -> BlockdevError:
    """A system call's failure: what this machine is short of now, it may have again."""
    text = f"{failed}: {error.strerror}"
    return LoginUnknown(text, host=asked) if shortage(error) else AccessDenied(text)


def _run(command: list[str], told: bytes, environment: dict[str, str]) -> tuple[int, bytes]:
    """Status and output of a program, which has HELPER_SECONDS. It is ended, with all that it has started, if it
    takes longer (TimeoutError) or says more than HELPER_OUTPUT_MAX: then that is cut off."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd="/",
        start_new_session=True,
        bufsize=0,
    ) as process:
        deadline = time.monotonic() + HELPER_SECONDS
        output = b""
        try:
            assert process.stdin
            assert process.stdout
            with contextlib.suppress(BrokenPipeError):  # a program need not listen
                process.stdin.write(told)  # less than a pipe holds
                process.stdin.close()
            stream = process.stdout.fileno()
            while len(output) <= HELPER_OUTPUT_MAX and (piece := _read_before(deadline, stream)):
                output += piece
            if len(output) <= HELPER_OUTPUT_MAX:
                process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:
            if process.returncode is None:  # so its number is still its own
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def _read_before(deadline: float, stream: int) -> bytes:
    """What a pipe has next, b"" at its end; TimeoutError."""
    ready = select.poll()
    ready.register(stream, select.POLLIN)
    if not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError
    return os.read(stream, HELPER_OUTPUT_MAX)


def _answer(output: bytes, failed: str) -> Credential | None:
    try:
        answer = json.loads(output)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise AccessDenied(f"{failed}: its answer is not a JSON object")
    username, secret = answer.get("Username"), answer.get("Secret")
    if not _is_text(username) or not _is_text(secret):
        raise AccessDenied(f"{failed}: its answer lacks Username or Secret")
    if not username and not secret:
        return None
    return Credential("", "", secret) if username == _TOKEN_USER else Credential(username, secret)


def _read(path: str, *, required: bool) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is no file and none is required."""
    failed = f"reading credentials failed: {path}"
    try:
        with open(path, "rb") as file:
            content = file.read(FILE_SIZE_MAX + 1)
    except FileNotFoundError:
        if required:
            raise AccessDenied(f"{failed}: no such file") from None
        return {}
    except OSError as error:
        raise _refusal(failed, error, path) from None
    if len(content) > FILE_SIZE_MAX:
        raise AccessDenied(f"{failed}: larger than {FILE_SIZE_MAX} bytes")
    config = None
    with contextlib.suppress(ValueError, RecursionError):  # their text may quote the content
        config = json.loads(content)
    if not isinstance(config, dict):
        raise AccessDenied(f"{failed}: not a JSON object")
    return config


def _is_text(value: object) -> TypeGuard[str]:
    """Whether it can be sent: JSON also has strings that are halves of a character."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _section(config: dict[str, Any], name: str, path: str) -> dict[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, dict):
        raise AccessDenied(f"reading credentials failed: {path}: {name} is not an object")
    return section


def _normal(key: str) -> str:
    """A key of `auths` as host[/path]: without scheme, API version or trailing slash."""
    key = re.sub(r"^https?://", "", key).rstrip("/")
    host, slash, path = key.partition("/")
    if path in ("v1", "v2"):
        slash = path = ""
    host = host.lower()
    return ("docker.io" if host in _DOCKER_HUB_HOSTS else host) + slash + path


def _scopes(host: str, repository: str) -> Iterator[str]:
    """host/a/b, host/a, host."""
    scope = f"{host}/{repository}"
    while scope:
        yield scope
        scope = scope.rpartition("/")[0]


def _login(entry: object, path: str, scope: str) -> Credential | None:
    """One value of `auths`; None if it is empty, as Docker leaves it beside a store."""
    failed = f"reading credentials failed: {path}: the entry of {scope}"
    values = entry if isinstance(entry, dict) else {}
    fields = [values.get(name) or "" for name in ("username", "password", "identitytoken", "auth")]
    if not isinstance(entry, dict) or not all(map(_is_text, fields)):
        raise AccessDenied(f"{failed} is malformed")
    username, password, token, packed = fields
    if packed:
        try:
            username, colon, password = base64.b64decode(packed, validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            colon = ""
        if not colon:
            raise AccessDenied(f"{failed} is not base64 of user:password")
    if token:
        return Credential(username, "", token)
    return Credential(username, password.rstrip("\0")) if username else None
