# SPDX-License-Identifier: Apache-2.0
"""Logging in to one registry: anonymous, Basic, or Bearer with tokens from its token service.

What a registry wants is learned from its 401 (distribution specification, "token"). A login is
kept per scope and shared by all threads: one of them renews it while the others wait, or go on
with what is still valid. Credentials are asked of the Provider anew each time they are needed.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from urllib.parse import urlencode

from blockdev.errors import AccessDenied, NotFound, SourceError
from blockdev.registry.credentials import Credential, Provider
from blockdev.registry.exchange import Exchange, Request, Task, origin

TOKEN_SECONDS = 60.0  # life of a token that does not say (distribution specification)
TOKEN_SECONDS_MAX = 86400.0  # believed; whatever is said, a 401 ends it
RENEW_SECONDS = 10.0  # before its end; a request under way is authorised when it starts
RENEW_PART = 0.25  # of a short life, at most
RENEW_PAUSE = 5.0  # between attempts while the token service fails and the old token is good
TOKEN_SIZE_MAX = 64 << 10  # of the token service's answer; cloud registries send about 4 KiB
CHALLENGE_SIZE_MAX = 8 << 10

_REFUSED = (400, 401, 403)  # 400 is OAuth's invalid_grant
_PART = re.compile(r"""([A-Za-z0-9_-]+)(?:\s*(=)\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*)))?""")
_TOKEN = re.compile(r"[\x21-\x7e]+")
_log = logging.getLogger(__name__)


class Scope(NamedTuple):
    """What a login is for."""

    repository: str
    actions: str  # "pull", "pull,push" or "delete"
    reading: str = ""  # another repository, to pull from

    def __str__(self) -> str:
        more = f" repository:{self.reading}:pull" if self.reading else ""
        return f"repository:{self.repository}:{self.actions}{more}" if self.repository else ""


@dataclass(frozen=True)
class Challenge:
    """What a 401 asks for."""

    scheme: str  # lower case
    parameters: Mapping[str, str]


@dataclass(frozen=True)
class _Login:
    header: str = field(repr=False)
    challenge: Challenge
    renew_at: float = float("inf")  # monotonic
    ends_at: float = float("inf")


class _Place:
    """Where the login of one scope is kept. The lock is held by whoever renews it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.login: _Login | None = None

    def await_turn(self, task: Task) -> None:
        """Take the lock; SourceError if the task's time ends before."""
        left = max(0.0, task.deadline - time.monotonic())
        if not self.lock.acquire(timeout=min(left, threading.TIMEOUT_MAX)):
            raise SourceError(f"{task.failed}: no time left while another request logs in")


@dataclass
class Rejection:
    """Why renew() is called: the header that was used, the reply's WWW-Authenticate, and what
    this request has tried so far (filled by renew())."""

    used: str | None = field(repr=False, default=None)
    challenge: str = ""
    tried: set[str] = field(repr=False, default_factory=set)


class Authorizer:
    """The logins of one registry. Thread-safe."""

    def __init__(self, exchange: Exchange, registry: str, provider: Provider) -> None:
        self._exchange = exchange
        self._registry = registry
        self._provider = provider
        self._lock = threading.Lock()
        self._places: dict[Scope, _Place] = {}

    def header(self, scope: Scope, task: Task) -> str | None:
        """The Authorization to send; None if nothing has asked for one. May renew a token that ends soon."""
        place = self._place(scope)
        login = place.login
        if login is None:
            return None
        if time.monotonic() < login.renew_at:
            return login.header
        good = time.monotonic() < login.ends_at
        if good:
            if not place.lock.acquire(blocking=False):
                return login.header
        else:
            place.await_turn(task)
        try:
            if place.login is not login:
                return place.login.header if place.login else None
            place.login = self._log_in(login.challenge, scope, task, set())
            return place.login.header
        except (AccessDenied, SourceError) as error:
            if not good:
                raise
            _log.warning("renewing a token failed, the old one is still good: %s", error)
            place.login = replace(login, renew_at=min(time.monotonic() + RENEW_PAUSE, login.ends_at))
            return login.header
        finally:
            place.lock.release()

    def renew(self, scope: Scope, task: Task, rejection: Rejection) -> str:
        """The Authorization to try after a reply has rejected one. AccessDenied when there is no other."""
        place = self._place(scope)
        place.await_turn(task)
        try:
            if place.login and place.login.header != rejection.used:
                return place.login.header  # somebody else was first
            challenge = parse_challenge(rejection.challenge)
            if challenge is None and place.login:
                challenge = place.login.challenge
            if challenge is None:
                raise AccessDenied(f"{task.failed}: access denied, and {self._registry} does not say how to log in")
            if challenge.scheme == "basic" and rejection.used:
                rejection.tried.add(rejection.used)
            place.login = None
            place.login = self._log_in(challenge, scope, task, rejection.tried)
            return place.login.header
        finally:
            place.lock.release()

    def _place(self, scope: Scope) -> _Place:
        with self._lock:
            return self._places.setdefault(scope, _Place())

    def _log_in(self, challenge: Challenge, scope: Scope, task: Task, tried: set[str]) -> _Login:
        """With the first credential that is not among the tried ones and is not refused."""
        offered = False
        for credential in self._provider.find(self._registry, scope.repository):
            offered = True
            mark = credential.identity_token or credential.basic
            if mark in tried:
                continue
            tried.add(mark)
            login = self._with(credential, challenge, scope, task)
            if login:
                return login
        if not offered and challenge.scheme == "bearer" and "" not in tried:
            tried.add("")
            login = self._with(None, challenge, scope, task)
            if login:
                return login
        known = "the credentials known for it were refused" if offered else "no credentials are known for it"
        raise AccessDenied(f"{task.failed}: access to {self._registry}/{scope.repository} denied: {known}")

    def _with(self, credential: Credential | None, challenge: Challenge, scope: Scope, task: Task) -> _Login | None:
        if challenge.scheme == "bearer":
            return self._token(credential, challenge, scope, task)
        if credential is None or credential.identity_token:
            return None
        return _Login(credential.basic, challenge)

    def _token(self, credential: Credential | None, challenge: Challenge, scope: Scope, task: Task) -> _Login | None:
        """Ask the token service; None if it refuses the credential."""
        realm = challenge.parameters.get("realm", "")
        self._exchange.check_url(realm, self._exchange.base(self._registry), task)
        asked = {
            "service": challenge.parameters.get("service", ""),
            "scope": challenge.parameters.get("scope", str(scope)),
        }
        asked = {name: value for name, value in asked.items() if value}
        if credential and credential.identity_token:
            form = {"grant_type": "refresh_token", "refresh_token": credential.identity_token, "client_id": "ociblk"}
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            request = Request("POST", realm, headers, urlencode(form | asked).encode(), secret=True)
        else:
            each = {name: value.split(" ") if name == "scope" else [value] for name, value in asked.items()}
            query = ("&" if "?" in realm else "?") + urlencode(each, doseq=True) if asked else ""
            request = Request("GET", realm + query).with_authorization(credential.basic if credential else None)
        service = replace(task, failed=f"{task.failed}: the token service {origin(realm)}")
        with self._exchange.send(service, request) as reply:
            if reply.status in _REFUSED:
                return None
            try:
                reply.require(200)
            except NotFound as error:  # which says nothing of the image
                raise SourceError(str(error)) from None
            return _login(reply.read_all(TOKEN_SIZE_MAX), challenge, service.failed)


def parse_challenge(header: str) -> Challenge | None:
    """The challenge of a WWW-Authenticate to answer: Bearer rather than Basic; None if it has neither."""
    found: dict[str, dict[str, str]] = {}
    parameters: dict[str, str] = {}
    for name, equals, quoted, plain in _PART.findall(header[:CHALLENGE_SIZE_MAX]):
        if equals:
            parameters[name.lower()] = re.sub(r"\\(.)", r"\1", quoted) or plain
        else:
            parameters = found.setdefault(name.lower(), {})
    for scheme in ("bearer", "basic"):
        if scheme in found:
            return Challenge(scheme, found[scheme])
    return None


def _login(answer: bytes, challenge: Challenge, failed: str) -> _Login:
    try:
        values = json.loads(answer)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise SourceError(f"{failed} did not answer with a JSON object")
    token = values.get("token") or values.get("access_token")
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise SourceError(f"{failed} did not answer with a token")
    life = values.get("expires_in")
    if not isinstance(life, int | float) or not 0 < life < float("inf"):
        life = TOKEN_SECONDS
    life = min(life, TOKEN_SECONDS_MAX)
    now = time.monotonic()
    return _Login(f"Bearer {token}", challenge, now + life - min(RENEW_SECONDS, life * RENEW_PART), now + life)
