# SPDX-License-Identifier: Apache-2.0
"""One HTTP request and its reply: TLS rules, time limits, and what an answer means.

The one translation from `requests` and HTTP to our errors; what goes over the wire at what pace is the
matter of blockdev/registry/connection.py. Redirects, logins and retries are the callers': send() does exactly
what it is told, once, or not at all while the host has told us to wait. TLS is always verified. No message
holds a URL's query, which may be a signature, nor what the server says about our login.
"""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import json
import logging
import os
import re
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from blockdev.engine import Fetch, HttpTarget, Trust
from blockdev.errors import AccessDenied, BlockdevError, NotFound, SourceError
from blockdev.registry.backoff import Backoff, LeftAlone
from blockdev.registry.connection import SLOWEST_RATE, Adapter, HeadTooLong, Limit, TooSlow
from blockdev.registry.trust import Trusted

CONNECT_SECONDS = 5.0  # a wrong address is told to a waiting user within this
STALL_SECONDS = 10.0  # longest silence of a server that has work to do; three fit into eio:30s
PIECE_SIZE = 64 << 10  # most that one read takes from the socket: the cache's extent
ERROR_TEXT_SIZE = 8 << 10  # of an error's JSON; registries write a few hundred bytes
BUSY_SECONDS = 1.0  # what a 429 or 503 without Retry-After asks for
USER_AGENT = "ociblk"

_DENIED = (401, 403)
_NOT_FOUND = 404
_BUSY = (429, 503)
_SERVER_ERRORS = 500
_BAD_REQUEST = 400
_HARMLESS = ("GET", "HEAD")  # may be sent twice
_CODES = (  # of the distribution specification
    "BLOB_UNKNOWN",
    "BLOB_UPLOAD_INVALID",
    "BLOB_UPLOAD_UNKNOWN",
    "DIGEST_INVALID",
    "MANIFEST_BLOB_UNKNOWN",
    "MANIFEST_INVALID",
    "MANIFEST_UNKNOWN",
    "NAME_INVALID",
    "NAME_UNKNOWN",
    "SIZE_INVALID",
    "UNAUTHORIZED",
    "DENIED",
    "UNSUPPORTED",
    "TOOMANYREQUESTS",
)
_QUERY = re.compile(r"\?\S+")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timeouts:
    """Seconds: to connect, and of silence before a server counts as stuck."""

    connect: float = CONNECT_SECONDS
    stall: float = STALL_SECONDS


@dataclass(frozen=True)
class Task:
    """What a request is for: how its failure is told ("what failed: which thing"), and until when (monotonic)."""

    failed: str
    deadline: float


@dataclass(frozen=True)
class Request:
    """What goes out. `patience` replaces the stall time where a server has long work to do.

    `secret`: it holds a login, which the answer may repeat.
    """

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    patience: float = 0.0
    secret: bool = False

    def with_authorization(self, value: str | None) -> Request:
        """The same with an Authorization header, if there is one to add."""
        if value is None:
            return self
        return replace(self, headers={**self.headers, "Authorization": value}, secret=True)


class Reply:
    """What came back. Its body is read piece by piece, or not at all; close() is cheap either way.

    A with block that ends well says that the host has delivered what was wanted.
    """

    def __init__(
        self, response: requests.Response, request: Request, task: Task, backoff: Backoff, limit: Limit
    ) -> None:
        self.status = response.status_code
        self.url = request.url
        self._response = response
        self._request = request
        self._task = task
        self._place = _place(task, request.url)
        self._host = urlsplit(request.url).netloc
        self._backoff = backoff
        self._limit = limit
        empty = self.header("Content-Length") == "0" and not self.header("Transfer-Encoding")
        if request.method == "HEAD" or empty:
            response.raw.read()  # nothing comes, but only now is the connection free for others

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._backoff.succeeded(self._host)
        self.close()

    @property
    def told_to_wait(self) -> float | None:
        """Seconds that the server wants to be left alone for; None if it does not say that."""
        return _told(self.status, self.header("Retry-After"))

    def header(self, name: str) -> str:
        """A header's value; "" if there is none."""
        return self._response.headers.get(name, "")

    def close(self) -> None:
        """Give the connection back, or drop it if a part of the body has not been read."""
        self._response.close()

    def extend(self, deadline: float) -> None:
        """Allow the body more time."""
        self._limit.deadline = deadline

    def read_piece(self, into: memoryview) -> int:
        """The next bytes of the body, as many as are here now, at most PIECE_SIZE; 0 at its end.

        SourceError if the body ends early, stalls, or the task's deadline has passed.
        """
        try:
            with self._limit:
                self._limit.patience()
                piece = self._response.raw.read1(min(len(into), PIECE_SIZE), decode_content=False)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._failure(_reason(error)) from None
        into[: len(piece)] = piece
        return len(piece)

    def _failure(self, why: str, retry_after: float | None = None) -> SourceError:
        return SourceError(f"{self._place}{why}", retry_after=retry_after, host=self._host)

    def read_all(self, limit: int) -> bytes:
        """The whole body; SourceError if it is larger than limit."""
        content = bytearray()
        piece = memoryview(bytearray(PIECE_SIZE))
        while count := self.read_piece(piece):
            content += piece[:count]
            if len(content) > limit:
                raise SourceError(f"{self._task.failed}: the answer is larger than {limit} bytes")
        return bytes(content)

    def require(self, *statuses: int) -> None:
        """Raise what the status means, unless it is one of these. Closes the reply then."""
        if self.status not in statuses:
            try:
                raise self._error()
            finally:
                self.close()

    def _error(self) -> BlockdevError:
        why = f"answered {self.status}{self._said()}"
        if self.status in _DENIED:
            return AccessDenied(f"{self._place}{why}")
        if self.status == _NOT_FOUND:
            return NotFound(f"{self._place}{why}")
        if self.status == _BAD_REQUEST and self.url.startswith("http:"):
            why += "; if it speaks TLS, say so with --ca FILE"
        return self._failure(why, self.told_to_wait)

    def _said(self) -> str:
        """The registry's own words, if it sent them in the standard form. Other bodies are not
        waited for: a 416 may announce the whole blob and send 14 bytes."""
        if "json" not in self.header("Content-Type"):
            return ""
        try:
            first = json.loads(self.read_all(ERROR_TEXT_SIZE))["errors"][0]
            if self._request.secret:  # it may be in the words, as it is or in some other form
                words = first["code"] if first["code"] in _CODES else ""
            else:
                words = _QUERY.sub("?", f"{first['code']} {first.get('message', '')}")
        except (SourceError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return ""
        words = "".join(c if c.isprintable() else " " for c in words[:200]).strip()
        return f" ({words})" if words else ""


@dataclass(frozen=True)
class Ranged:
    """A GET that the engine can send by itself, for any range."""

    url: str
    target: HttpTarget


class Exchange:
    """Sends requests. Thread-safe; connections are kept and shared.

    `ca` is the text of PEM certificates to trust besides the system's. Plain HTTP is spoken with
    `plain_http`, or to loopback when no `ca` is given; nothing else ever falls back to it.
    """

    def __init__(self, *, ca: str | None, plain_http: bool, timeouts: Timeouts, backoff: Backoff) -> None:
        self.backoff = backoff
        self._ca = ca
        self._trusted = Trusted(ca)
        self._plain_http = plain_http
        self._timeouts = timeouts
        self._closed = False
        self._settings = requests.Session()  # asked for proxies and $REQUESTS_CA_BUNDLE only
        self._adapter = Adapter(self._trusted.context)
        # urllib3 logs whole URLs at DEBUG, signatures included.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.INFO)

    def close(self) -> None:
        """Drop the kept connections. Whoever is still at a request gets no other."""
        self._closed = True
        self._adapter.close()

    def base(self, host: str) -> str:
        """scheme://host of a registry."""
        return f"{'http' if self._may_be_plain(f'http://{host}') else 'https'}://{host}"

    def check_url(self, url: str, came_from: str, task: Task) -> None:
        """SourceError for a URL from a reply that is none, or leads to where TLS would be lost, or out of HTTP."""
        try:
            scheme = urlsplit(requests.Request("GET", url).prepare().url or "").scheme
        except requests.exceptions.MissingSchema:
            scheme = ""
        except ValueError:
            raise SourceError(f"{task.failed}: {origin(came_from)} points to what is no URL") from None
        plain = scheme == "http" and urlsplit(came_from).scheme == "http" and self._may_be_plain(url)
        if scheme != "https" and not plain:
            raise SourceError(f"{task.failed}: {origin(came_from)} points to {origin(url)}, which is not safe to use")

    def target(self, location: str, came_from: str, task: Task) -> str:
        """The URL that a reply's Location means, checked."""
        try:
            url = urljoin(came_from, location)
        except ValueError:
            raise SourceError(f"{task.failed}: {origin(came_from)} points to what is no URL") from None
        self.check_url(url, came_from, task)
        return url

    def send(self, task: Task, request: Request) -> Reply:
        """One request, one reply of whatever status. SourceError if there is no reply.

        LeftAlone without a request while the host wants none.
        """
        host = urlsplit(request.url).netloc
        self._time_left(task, request.url)
        limit = Limit(task.deadline, request.patience or self._timeouts.stall)
        try:
            response = self._send(request, limit)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise SourceError(f"{_place(task, request.url)}{_reason(error)}", host=host) from None
        _log.debug("%s %s: %d", request.method, without_secrets(request.url), response.status_code)
        limit.in_head = False
        reply = Reply(response, request, task, self.backoff, limit)
        self._heed(host, reply.told_to_wait)
        return reply

    def _send(self, request: Request, limit: Limit) -> requests.Response:
        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **request.headers}
        prepared = requests.Request(request.method, request.url, headers, data=request.body).prepare()
        settings: Any = self._settings.merge_environment_settings(request.url, {}, True, True, None)
        with limit:
            # Not Session.send(): it reads the bodies of redirects to the end, and asks ~/.netrc.
            settings["timeout"] = min(self._timeouts.connect, limit.patience())
            try:
                return self._adapter.send(prepared, **settings)
            except requests.ConnectionError:
                # A server may close a kept connection just as a request is under way on it.
                if request.method not in _HARMLESS or not limit.reused or limit.received:
                    raise
            limit.fresh = True
            return self._adapter.send(prepared, **settings)

    def ranged(self, task: Task, request: Request) -> Ranged | None:
        """A GET, for fill(); None if the engine cannot send it: through a proxy that does not speak HTTP."""
        url = requests.Request(request.method, request.url).prepare().url or ""
        settings: Any = self._settings.merge_environment_settings(url, {}, True, True, None)
        proxy = requests.utils.select_proxy(url, settings["proxies"]) or ""
        if "://" in proxy and not proxy.startswith("http://"):
            return None
        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **request.headers}
        try:
            trust = self._trusted.for_engine(settings["verify"]) if url.startswith("https:") else Trust()
        except OSError as error:
            raise SourceError(f"{_place(task, url)}reading certificates failed: {_reason(error)}") from None
        lines = [f"{name}: {value}" for name, value in headers.items()]
        target = HttpTarget(
            _place(task, url).removesuffix(": "),
            url,
            lines,
            proxy=proxy,
            trust=trust,
            connect=self._timeouts.connect,
            stall=self._timeouts.stall,
            slowest=SLOWEST_RATE,
        )
        return Ranged(url, target)

    def fill(self, task: Task, ranged: Ranged, fetch: Fetch) -> int:
        """Have the engine send it for what the fetch wants, once. 206: all is there. Another status: nothing is;
        0 stands for a 206 that holds something else.

        As send(), SourceError or LeftAlone if there is no answer, or one that asking again will not change.
        """
        host = urlsplit(ranged.url).netloc
        left = self._time_left(task, ranged.url)
        try:
            refusal = fetch.get(ranged.target, timeout=left)
        except SourceError as error:
            raise SourceError(str(error), host=host) from None
        if refusal is None:
            self.backoff.succeeded(host)
            return 206
        _log.debug("GET %s: %d", without_secrets(ranged.url), refusal.status)
        told = _told(refusal.status, refusal.retry_after)
        self._heed(host, told)
        if told is not None or refusal.status >= _SERVER_ERRORS:
            why = f"{_place(task, ranged.url)}answered {refusal.status}"
            raise SourceError(why, retry_after=told, host=host)
        return refusal.status if refusal.status != 206 else 0

    def _time_left(self, task: Task, url: str) -> float:
        """Seconds for a request to this URL, if it may be sent now."""
        left = task.deadline - time.monotonic()
        if left <= 0 or self._closed:
            raise SourceError(f"{_place(task, url)}{'it is being closed' if self._closed else 'no time left'}")
        wait = self.backoff.admit(urlsplit(url).netloc)
        if wait:
            raise LeftAlone(f"{_place(task, url)}it told us to wait, {wait:.1f} s more", seconds=wait)
        return left

    def _heed(self, host: str, told: float | None) -> None:
        if told is None:
            self.backoff.answered(host)
        else:
            self.backoff.told(host, told)

    def _may_be_plain(self, url: str) -> bool:
        return self._plain_http or (self._ca is None and is_loopback(urlsplit(url).hostname or ""))


def is_loopback(host: str) -> bool:
    """localhost, 127.0.0.0/8 or ::1, as written: names are not resolved."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def origin(url: str) -> str:
    """scheme://host:port, which is what an Authorization header belongs to."""
    parts = urlsplit(url)
    try:
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        port = None
    return f"{parts.scheme}://{parts.hostname}:{port}"


def without_secrets(url: str) -> str:
    """For logs: without query, user and password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _place(task: Task, url: str) -> str:
    """The start of a message: what failed, and at which host unless that has been said."""
    said = urlsplit(url).netloc in task.failed
    return f"{task.failed}: " if said else f"{task.failed}: {origin(url)}: "


def _told(status: int, retry_after: str) -> float | None:
    """Seconds that a server wants to be left alone for; None if it does not say that."""
    if status not in _BUSY and status < _SERVER_ERRORS:
        return None
    told = _retry_after(retry_after)
    return BUSY_SECONDS if told is None and status in _BUSY else told


def _retry_after(value: str) -> float | None:
    """Seconds from now, of either form of Retry-After."""
    if value.isascii() and value.isdigit() and len(value) < 10:
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):
        return None
    return max(when - time.time(), 0.0)


def _reason(error: BaseException) -> str:
    """Why a request failed, in words without URLs: of all that led to it, what says most."""
    causes: list[BaseException] = []
    pending: list[object] = [error]
    while pending:
        link = pending.pop()
        if isinstance(link, BaseException) and link not in causes:
            causes.append(link)
            pending += [link.__context__, link.__cause__, getattr(link, "reason", None), *link.args]
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted ({cause.verify_message})"
    for kinds, words in _REASONS:
        if any(isinstance(cause, kinds) for cause in causes):
            return words
    numbers = [cause.errno for cause in causes if isinstance(cause, OSError) and cause.errno]
    return os.strerror(numbers[-1]).lower() if numbers else f"the connection failed ({type(causes[-1]).__name__})"


_REASONS: tuple[tuple[tuple[type[BaseException], ...], str], ...] = (
    ((socket.gaierror, UnicodeError), "no such host"),
    ((ssl.SSLError,), "TLS failed"),
    ((urllib3.exceptions.ProxyError,), "the proxy failed"),
    ((ConnectionRefusedError,), "connection refused"),
    ((TooSlow,), "the answer is too slow"),
    ((HeadTooLong,), "the head of the answer is too long"),
    ((TimeoutError, urllib3.exceptions.ReadTimeoutError), "no answer in time"),
    ((urllib3.exceptions.IncompleteRead,), "the answer ended early"),
    ((http.client.RemoteDisconnected,), "the connection was closed without an answer"),
)
