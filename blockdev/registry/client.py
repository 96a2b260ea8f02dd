# SPDX-License-Identifier: Apache-2.0
"""One registry, as the distribution specification 1.1 has it: manifests and blobs, read and written.

Every call does its work once: it logs in and follows redirects where the registry asks for that,
and otherwise fails with one of our errors (blockdev/errors.py). Trying again is the caller's
decision (blockdev/source/retrying.py). Sizes and offsets are bytes. Thread-safe.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self
from urllib.parse import quote, urlsplit

from blockdev.engine import Fetch
from blockdev.errors import AccessDenied, CorruptImage, NotFound, SourceError
from blockdev.registry.auth import Authorizer, Rejection, Scope
from blockdev.registry.backoff import Backoff, LeftAlone
from blockdev.registry.credentials import Provider
from blockdev.registry.exchange import Exchange, Ranged, Reply, Request, Task, Timeouts, origin
from blockdev.registry.upload import CHUNK, Attempt, Upload, once
from formats import oci

ANSWER_SECONDS = 30.0  # for anything but a blob's bytes: a token, a redirect and the answer
DOCUMENT_SECONDS = 60.0  # for a manifest or config of the largest size over a slow line
REDIRECTS_MAX = 5
LOGINS_MAX = 4  # for one request: another thread's, ours, and each of two credential sources
TARGET_SECONDS = 240.0  # a redirect's target is used again this long; signatures live 5 minutes and more
_HOSTS = {"docker.io": "registry-1.docker.io"}  # where the API is not at the registry's own name
_REDIRECTS = (301, 302, 303, 307, 308)
_STALE = (400, 401, 403, 404, 410)  # what stores answer to an expired signature, or when they have moved it
_DENIED = (401, 403)
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_ACCEPT = ", ".join((*oci.MANIFEST_TYPES, *oci.INDEX_TYPES))
_EVERYTHING = Scope("", "")


class Document(NamedTuple):
    """A manifest or index as the registry sent it; the digest is computed from the body."""

    media_type: str
    digest: str
    body: bytes


class Part(NamedTuple):
    """A range of a blob, wanted or delivered."""

    repository: str
    digest: str
    offset: int
    length: int


@dataclass
class Body:
    """The bytes of the range that was asked for, about to arrive; or, if `whole`, all of the blob.

    `total` is the blob's size as the registry sees it, None if it does not say.
    """

    reply: Reply
    total: int | None
    whole: bool

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reply.__exit__(kind, error, trace)


@dataclass
class _Way:
    """Where a blob was found."""

    url: str
    home: bool  # at the registry itself, which wants a login
    until: float  # monotonic
    ranged: tuple[str | None, Ranged | None] | None = None  # for the engine, with the login it was made for


class Client:
    """A registry, with the credentials of one caller."""

    def __init__(
        self,
        registry: str,
        provider: Provider,
        *,
        ca: str | None = None,
        plain_http: bool = False,
        timeouts: Timeouts | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        """`registry` is a reference's host[:port]; `ca` and `plain_http` as in blockdev/registry/exchange.py.

        `backoff` is shared with whoever else talks to the same hosts.
        """
        self.registry = registry
        self.host = _HOSTS.get(registry, registry)
        self._exchange = Exchange(
            ca=ca, plain_http=plain_http, timeouts=timeouts or Timeouts(), backoff=backoff or Backoff()
        )
        self._base = self._exchange.base(self.host)
        self._authorizer = Authorizer(self._exchange, registry, provider)
        self._lock = threading.Lock()
        self._ways: dict[tuple[str, str], _Way] = {}  # to blobs, as they were found last

    def close(self) -> None:
        """Drop the kept connections."""
        self._exchange.close()

    # ---- reading -------------------------------------------------------------------------

    def ping(self) -> None:
        """Check that a registry answers there and lets us in."""
        task = self.task("asking the registry", "", ANSWER_SECONDS)
        with self.send(task, _EVERYTHING, Request("GET", f"{self._base}/v2/")) as reply:
            reply.require(200)

    def resolve(self, repository: str, tag: str) -> str:
        """The digest that a tag stands for now."""
        return self.manifest(repository, tag).digest

    def manifest(self, repository: str, identifier: str) -> Document:
        """A manifest or index by tag or digest. CorruptImage if it has not the digest that was asked for."""
        separator = "@" if ":" in identifier else ":"
        task = self.task("fetching a manifest", f"/{repository}{separator}{identifier}", DOCUMENT_SECONDS)
        request = Request("GET", self.url(repository, f"manifests/{identifier}"), {"Accept": _ACCEPT})
        with self.follow(task, Scope(repository, "pull"), request) as reply:
            reply.require(200)
            body = reply.read_all(oci.DOCUMENT_SIZE_MAX)
        if separator == "@":
            _check_digest(task, identifier, body)
        digest = identifier if separator == "@" else oci.digest_of(body)
        return Document(reply.header("Content-Type").partition(";")[0].strip(), digest, body)

    def blob_size(self, repository: str, digest: str) -> int:
        """Bytes of a blob; NotFound if the repository has none of that digest."""
        task = self.task("looking for a blob", f"/{repository}@{digest}", ANSWER_SECONDS)
        with self.follow(task, Scope(repository, "pull"), Request("HEAD", self.blob_url(repository, digest))) as reply:
            reply.require(200)
            return _length(reply, task)

    def blob(self, repository: str, digest: str, limit: int) -> bytes:
        """A small blob, such as a config, whole and checked. CorruptImage if it has another digest."""
        task = self.task("fetching a blob", f"/{repository}@{digest}", DOCUMENT_SECONDS)
        with self.follow(task, Scope(repository, "pull"), Request("GET", self.blob_url(repository, digest))) as reply:
            reply.require(200)
            body = reply.read_all(limit)
        _check_digest(task, digest, body)
        return body

    def open_part(self, part: Part, deadline: float) -> Body:
        """Ask for a range of a blob. The body is there to be read until `deadline` (monotonic).

        SourceError if the answer is not that range and not the whole blob either.
        """
        task = self._reading(part, deadline)
        headers = {"Range": f"bytes={part.offset}-{part.offset + part.length - 1}"}
        request = Request("GET", self.blob_url(part.repository, part.digest), headers)
        reply = self._from_target(task, part, request) or self.follow(task, Scope(part.repository, "pull"), request)
        try:
            reply.require(200, 206)
            body = _body(reply, part, task)
        except (AccessDenied, NotFound) as error:
            if origin(reply.url) == origin(self._base):
                raise
            # The registry let us in and sent us there: its store is in disorder, and that may pass.
            raise SourceError(str(error), host=urlsplit(reply.url).netloc) from None
        except BaseException:
            reply.close()
            raise
        self._remember(part, reply.url)
        return body

    def fill_part(self, part: Part, fetch: Fetch, deadline: float) -> int:
        """Have the engine ask where open_part() found the blob last. 206: it has the part. Else it has
        nothing of it, and open_part() has to find out why: what was answered, 0 if nothing was asked."""
        key = (part.repository, part.digest)
        way = self._ways.get(key)
        if way is None or time.monotonic() >= way.until:
            return 0
        task = self._reading(part, deadline)
        header = self._authorizer.header(Scope(part.repository, "pull"), task) if way.home else None
        if way.ranged is None or header != way.ranged[0]:
            way.ranged = header, self._exchange.ranged(task, Request("GET", way.url).with_authorization(header))
        ranged = way.ranged[1]
        if ranged is None:
            return 0
        try:
            status = self._exchange.fill(task, ranged, fetch)
        except LeftAlone:
            raise
        except SourceError:
            self._forget(key)
            raise
        if status != 206:
            self._forget(key)
        return status

    def _from_target(self, task: Task, part: Part, request: Request) -> Reply | None:
        """Ask where the blob was redirected to last; None if that is not known, or no longer right."""
        key = (part.repository, part.digest)
        way = self._ways.get(key)
        if way is None or way.home or time.monotonic() >= way.until:
            return None
        try:
            reply = self._exchange.send(task, Request(request.method, way.url, request.headers))
        except SourceError:
            self._forget(key)
            raise
        if reply.status in (200, 206):
            return reply
        self._forget(key)
        if reply.status in _STALE:
            reply.close()
            return None
        return reply

    def _forget(self, key: tuple[str, str]) -> None:
        with self._lock:  # which _remember() holds while it walks through them
            self._ways.pop(key, None)

    def _remember(self, part: Part, url: str) -> None:
        home = origin(url) == origin(self._base)
        now = time.monotonic()
        way = _Way(url, home, float("inf") if home else now + TARGET_SECONDS)
        with self._lock:
            self._ways = {blob: kept for blob, kept in self._ways.items() if kept.until > now}
            self._ways.setdefault((part.repository, part.digest), way)

    # ---- writing ----------------------------------------------------------------------------

    def upload(
        self,
        repository: str,
        digest: str,
        size: int,
        file: BinaryIO,
        progress: Callable[[int], None] = lambda sent: None,
        others: Iterable[str] = (),
        attempt: Attempt = once,
    ) -> bool:
        """Send a blob from where the file stands, unless the registry has it: False then.

        `progress` is told how many bytes have arrived so far. `others` are repositories that may have
        the blob: the registry is asked to take it from there. `attempt` runs each step, and may run it again.
        """
        upload = Upload(self, repository, digest)
        mounts = (partial(upload.mount, other) for other in others if other != repository)
        if attempt(upload.find) or any(attempt(mount) for mount in mounts):
            return False
        attempt(upload.begin)
        while chunk := file.read(CHUNK):
            attempt(partial(upload.send, chunk))
            progress(upload.sent)
        if upload.sent != size:
            raise CorruptImage(f"{upload.failed}: the file has {upload.sent} bytes instead of {size}")
        attempt(upload.commit)
        return True

    def check_upload(self, repository: str) -> None:
        """Raise what an upload would, before there is anything to send."""
        upload = Upload(self, repository)
        upload.begin()
        upload.abandon()

    def put_manifest(self, repository: str, identifier: str, media_type: str, body: bytes) -> str:
        """Store a manifest or index under a tag or its digest; returns its digest."""
        self._put_manifest(repository, identifier, media_type, body)
        return oci.digest_of(body)

    def put_referrer(self, repository: str, media_type: str, body: bytes) -> bool:
        """Store a manifest or index that has a subject; whether the registry lists it as a referrer by itself."""
        return self._put_manifest(repository, oci.digest_of(body), media_type, body) != ""

    def _put_manifest(self, repository: str, identifier: str, media_type: str, body: bytes) -> str:
        """What the registry says the subject is."""
        task = self.task("pushing a manifest", f"/{repository}:{identifier}", ANSWER_SECONDS)
        url = self.url(repository, f"manifests/{identifier}")
        request = Request("PUT", url, {"Content-Type": media_type}, body)
        with self.send(task, Scope(repository, "pull,push"), request) as reply:
            reply.require(201)
            return reply.header("OCI-Subject")

    # ---- requests -----------------------------------------------------------------------------

    def task(self, doing: str, thing: str, seconds: float) -> Task:
        return Task(f"{doing} failed: {self.registry}{thing}", time.monotonic() + seconds)

    def _reading(self, part: Part, deadline: float) -> Task:
        return Task(f"reading a blob failed: {self.registry}/{part.repository}@{part.digest}", deadline)

    def url(self, repository: str, rest: str) -> str:
        return f"{self._base}/v2/{quote(repository)}/{quote(rest, safe='/:')}"

    def blob_url(self, repository: str, digest: str) -> str:
        return self.url(repository, f"blobs/{digest}")

    def follow(self, task: Task, scope: Scope, request: Request) -> Reply:
        """Send, and go where redirects lead."""
        reply = self.send(task, scope, request)
        for _ in range(REDIRECTS_MAX):
            if reply.status not in _REDIRECTS:
                return reply
            reply.close()
            target = self.target(reply, task)
            reply = self.send(task, scope, Request(request.method, target, request.headers))
        reply.close()
        raise SourceError(f"{task.failed}: {urlsplit(self._base).netloc} redirects more than {REDIRECTS_MAX} times")

    def target(self, reply: Reply, task: Task) -> str:
        """Where an answer sends us."""
        return self._exchange.target(reply.header("Location"), reply.url, task)

    def send(self, task: Task, scope: Scope, request: Request) -> Reply:
        """Send, logging in if the registry wants that. Only the registry itself is sent a login."""
        if origin(request.url) != origin(self._base):
            return self._exchange.send(task, request)
        rejection = Rejection(self._authorizer.header(scope, task))
        turns = 0
        while True:
            reply = self._exchange.send(task, request.with_authorization(rejection.used))
            rejection.challenge = reply.header("WWW-Authenticate")
            turns += 1
            may_help = reply.status in _DENIED and (rejection.used or rejection.challenge)
            if not may_help or turns > LOGINS_MAX:
                return reply
            reply.close()
            rejection.used = self._authorizer.renew(scope, task, rejection)


def _check_digest(task: Task, digest: str, body: bytes) -> None:
    if not oci.matches(digest, body):
        raise CorruptImage(f"{task.failed}: what came has the digest sha256:{hashlib.sha256(body).hexdigest()}")


def _length(reply: Reply, task: Task) -> int:
    length = reply.header("Content-Length")
    if not (length.isascii() and length.isdigit() and len(length) < 19):
        raise SourceError(f"{task.failed}: {origin(reply.url)} does not tell its size")
    return int(length)


def _body(reply: Reply, part: Part, task: Task) -> Body:
    """What a 200 or 206 brings. Anything but the range or the whole is an error."""
    if reply.header("Content-Encoding") not in ("", "identity"):
        raise SourceError(f"{task.failed}: {origin(reply.url)} sends it in another encoding")
    if reply.status == 200:
        total = _length(reply, task) if reply.header("Content-Length") else None
        return Body(reply, total, whole=True)
    said = reply.header("Content-Range")
    match = _CONTENT_RANGE.fullmatch(said)
    if not match or (int(match[1]), int(match[2])) != (part.offset, part.offset + part.length - 1):
        wanted = f"bytes {part.offset}-{part.offset + part.length - 1}"
        sent = said if match else "an unnamed part"  # what is no range may be anything: a login that came back
        raise SourceError(f"{task.failed}: asked for {wanted}, {origin(reply.url)} sends {sent}")
    return Body(reply, None if match[3] == "*" else int(match[3]), whole=False)
