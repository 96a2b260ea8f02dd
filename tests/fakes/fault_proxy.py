# SPDX-License-Identifier: Apache-2.0
"""A registry's front that misbehaves as it is told, before a real registry (tests/registries.py).

Three hosts: the front itself, its token service (with `login`) and an object store that the front
redirects blobs to (with `redirects`). Without faults it is the registry, and passes its contract
suite. `plan` switches faults on: each request draws from it, by seed, whether and which.
`served` is the log of everything it was asked.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import itertools
import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Self

from tests.fakes.http_server import Answer, Ending, HttpServer, Seen

MUTE_SECONDS = 1.5  # that a name does not resolve for
_HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade"}


class Fault(Enum):
    """What can go wrong with a request."""

    EXPIRED_TOKEN = "401: every token given so far is no good any more"
    EXPIRED_REDIRECT = "403: every URL signed so far is no good any more"
    IGNORED_RANGE = "200 and the whole blob"
    NOT_SATISFIABLE = "416, with the length of the whole blob"
    LIMITED = "429, with Retry-After or without, for a while"
    BUSY = "503, with Retry-After or without, for a while"
    STALL = "not a byte more"
    TRICKLE = "a byte a second"
    RESET = "a connection reset in mid-body"
    SHORT = "a body that ends before its Content-Length"
    WRONG_BYTES = "a byte that is not the blob's"
    WRONG_RANGE = "another range than was asked for, by its Content-Range"
    NO_DNS = "the names do not resolve for a while, and no connection is kept"


LOSING = {  # bytes that were asked for and not refused do not arrive, or are wrong
    Fault.RESET,
    Fault.SHORT,
    Fault.STALL,
    Fault.TRICKLE,
    Fault.WRONG_BYTES,
    Fault.WRONG_RANGE,
    Fault.NO_DNS,
}
SLOW = {Fault.STALL: 0.1, Fault.TRICKLE: 0.1, Fault.NO_DNS: 0.1}  # drawn more seldom: each costs seconds


@dataclass(frozen=True)
class Plan:
    """Which fault the n-th request meets, if any: the same for the same seed.

    `rate` of the requests meet one of the faults, each as often as the others but for the SLOW.
    """

    faults: tuple[Fault, ...]
    seed: int
    rate: float

    def draw(self, number: int) -> tuple[Fault | None, random.Random]:
        """The fault, and chance for its details."""
        chance = random.Random(f"{self.seed}/{number}")
        if not self.faults:
            return None, chance
        fault = chance.choice(self.faults)
        return (fault if chance.random() < self.rate * SLOW.get(fault, 1.0) else None), chance


CALM = Plan((), 0, 0.0)


@dataclass(frozen=True)
class Served:
    """One request and what came of it. Times are monotonic seconds, `told` how long it was told to wait."""

    number: int
    at: float
    host: str
    method: str
    path: str
    range: tuple[int, int] | None
    status: int  # 0: none was sent
    fault: Fault | None
    told: float

    @property
    def length(self) -> int:
        """Bytes of a blob that were asked for and not refused."""
        if self.range is None or self.status not in (0, 200, 206):
            return 0
        return self.range[1] - self.range[0] + 1


class FaultProxy:
    """Serves from construction to close().

    `login` is user:password for the token service, "" lets everybody in. `names` are what clients
    call the front, the token service and the store; resolve(True or False) makes them known or not.
    """

    def __init__(
        self,
        upstream: str,
        *,
        login: str = "",
        redirects: bool = False,
        names: tuple[str, str, str] = ("127.0.0.1",) * 3,
        resolve: Callable[[bool], object] = lambda known: None,
    ) -> None:
        self.plan = CALM
        self.served: list[Served] = []
        self._upstream = upstream
        self._login = login
        self._redirects = redirects
        self._resolve = resolve
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._epoch = {Fault.EXPIRED_TOKEN: 0, Fault.EXPIRED_REDIRECT: 0}
        self._told: dict[str, tuple[int, float, str]] = {}  # host → status, until when, Retry-After's form
        self._connections = threading.local()
        self._dark: threading.Timer | None = None
        self._servers = [HttpServer(answer) for answer in (self._front, self._tokens, self._store)]
        ports = [server.host.rpartition(":")[2] for server in self._servers]
        self.host, self.token_host, self.store_host = (
            f"{name}:{port}" for name, port in zip(names, ports, strict=True)
        )

    @property
    def secrets(self) -> list[str]:
        """What must stand in no log: this, and all that begins so."""
        password = self._login.partition(":")[2]
        packed = base64.b64encode(self._login.encode()).decode()
        return [secret for secret in (password, packed, "t0ken-", "s1gnature") if secret]

    def close(self) -> None:
        if self._dark:
            self._dark.join()
        for server in self._servers:
            server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    # ---- the three hosts ----

    def _front(self, seen: Seen) -> Answer:
        return self._serve(seen, self.host, self._from_registry)

    def _tokens(self, seen: Seen) -> Answer:
        return self._serve(seen, self.token_host, self._token)

    def _store(self, seen: Seen) -> Answer:
        return self._serve(seen, self.store_host, self._from_store)

    def _serve(self, seen: Seen, host: str, rightly: Callable[[Seen], Answer]) -> Answer:
        at, number, asked = time.monotonic(), next(self._numbers), seen.range
        fault, chance = self.plan.draw(number)
        answer, told = self._refusal(host, fault, chance), 0.0
        if answer:
            told = self._told[host][1] - at
        elif fault is Fault.NO_DNS:
            answer = self._go_dark()
        else:
            if fault in self._epoch:
                with self._lock:
                    self._epoch[fault] += 1
            if fault is Fault.IGNORED_RANGE:
                seen = Seen(seen.method, seen.path, seen.query, _without(seen, "range"), seen.body, seen.port)
            answer = rightly(seen)
            if fault and answer.status == 206:
                answer = _spoilt(answer, fault, chance)
        if self._dark and self._dark.is_alive():
            answer.headers["Connection"] = "close"  # so that the next request has to find us by name
        status = 0 if answer.mute else answer.status
        self.served.append(Served(number, at, host, seen.method, seen.path, asked, status, fault, told))
        return answer

    def _from_registry(self, seen: Seen) -> Answer:
        if self._login and seen.headers.get("authorization") != f"Bearer {self._good_token}":
            challenge = f'Bearer realm="http://{self.token_host}/token",service="proxy"'
            return Answer(401, {"WWW-Authenticate": challenge})
        if self._redirects and seen.method in ("GET", "HEAD") and "/blobs/sha256:" in seen.path:
            place = f"http://{self.store_host}{seen.path}?X-Signature=s1gnature{self._epoch[Fault.EXPIRED_REDIRECT]}"
            return Answer(307, {"Location": place})
        return self._forward(seen)

    def _from_store(self, seen: Seen) -> Answer:
        signed = seen.query == f"X-Signature=s1gnature{self._epoch[Fault.EXPIRED_REDIRECT]}"
        if not signed or "authorization" in seen.headers:
            return Answer(403, {}, b"<Error><Code>AccessDenied</Code></Error>")  # as S3 does
        return self._forward(seen)

    def _token(self, seen: Seen) -> Answer:
        kind, _, packed = seen.headers.get("authorization", "").partition(" ")
        if kind != "Basic" or base64.b64decode(packed).decode() != self._login:
            return Answer(401, {}, b"{}")
        body = json.dumps({"token": self._good_token, "expires_in": 3600}).encode()
        return Answer(200, {"Content-Type": "application/json"}, body)

    @property
    def _good_token(self) -> str:
        return f"t0ken-{self._epoch[Fault.EXPIRED_TOKEN]}"

    def _forward(self, seen: Seen) -> Answer:
        """What the real registry says; a reset connection if it is not there."""
        headers = {name: value for name, value in seen.headers.items() if name not in _HOP_HEADERS}
        if self._login:
            headers.pop("authorization", None)
        target = f"{seen.path}?{seen.query}" if seen.query and not self._redirects else seen.path
        for attempt in range(2):  # the first may find a connection that was kept for too long
            connection = getattr(self._connections, "kept", None)
            if connection is None or attempt:
                connection = self._connections.kept = http.client.HTTPConnection(self._upstream)
            try:
                connection.request(seen.method, target, seen.body or None, headers)
                reply = connection.getresponse()
                return Answer(reply.status, _headers(reply), reply.read())
            except (OSError, http.client.HTTPException):
                connection.close()
        return Answer(mute=True, ending=Ending.RESET)

    # ---- faults that last ----

    def _refusal(self, host: str, fault: Fault | None, chance: random.Random) -> Answer | None:
        """429 or 503, if the host is to be left alone, from now on or since a while."""
        now = time.monotonic()
        with self._lock:
            if fault in (Fault.LIMITED, Fault.BUSY) and now >= self._told.get(host, (0, 0.0, ""))[1]:
                form = chance.choice(("", "seconds", "date"))
                seconds = 1.0 if not form else float(chance.randint(1, 3))
                self._told[host] = 429 if fault is Fault.LIMITED else 503, now + seconds, form
            status, until, form = self._told.get(host, (0, 0.0, ""))
        if now >= until:
            return None
        left = until - now
        if form == "date":  # in whole seconds, and never too early
            return Answer(status, {"Retry-After": email.utils.formatdate(time.time() + left + 1, usegmt=True)})
        return Answer(status, {"Retry-After": str(int(left + 1))} if form else {})

    def _go_dark(self) -> Answer:
        with self._lock:
            if self._dark is None or not self._dark.is_alive():
                self._resolve(False)
                self._dark = threading.Timer(MUTE_SECONDS, self._resolve, (True,))
                self._dark.start()
        return Answer(mute=True)


def _spoilt(answer: Answer, fault: Fault, chance: random.Random) -> Answer:
    """The right answer to a range, with a fault in it."""
    length = len(answer.body)
    at = chance.randrange(length)
    if fault is Fault.NOT_SATISFIABLE:
        whole = answer.headers["Content-Range"].rpartition("/")[2]
        return Answer(416, {"Content-Length": whole}, b"invalid range\n", cut=14)  # as docker-registry 2.8 does
    if fault is Fault.STALL and chance.random() < 0.5:
        return Answer(mute=True, ending=Ending.STALL)
    if fault in _ENDINGS:
        return Answer(answer.status, answer.headers, answer.body, cut=at, ending=_ENDINGS[fault])
    if fault is Fault.WRONG_BYTES:
        wrong = bytearray(answer.body)
        wrong[at] ^= chance.randrange(1, 256)
        return Answer(answer.status, answer.headers, bytes(wrong))
    if fault is Fault.WRONG_RANGE:
        first, _, rest = answer.headers["Content-Range"].removeprefix("bytes ").partition("-")
        last, _, total = rest.partition("/")
        shifted = f"bytes {int(first) + 512}-{int(last) + 512}/{total}"
        return Answer(answer.status, {**answer.headers, "Content-Range": shifted}, answer.body)
    return answer


_ENDINGS = {
    Fault.STALL: Ending.STALL,
    Fault.TRICKLE: Ending.TRICKLE,
    Fault.RESET: Ending.RESET,
    Fault.SHORT: Ending.CLOSE,
}


def forwarded(seen: Seen, upstream: str) -> Answer:
    """What a real registry says to the same request."""
    connection = http.client.HTTPConnection(upstream)
    connection.request(seen.method, seen.path, seen.body or None, _without(seen, "host"))
    reply = connection.getresponse()
    answer = Answer(reply.status, _headers(reply), reply.read())
    connection.close()
    return answer


def _headers(reply: http.client.HTTPResponse) -> dict[str, str]:
    return {name: value for name, value in reply.getheaders() if name.lower() not in {*_HOP_HEADERS, "date", "server"}}


def _without(seen: Seen, name: str) -> dict[str, str]:
    return {known: value for known, value in seen.headers.items() if known != name}
