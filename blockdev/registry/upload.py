# SPDX-License-Identifier: Apache-2.0
"""A blob on its way into a repository: found there, taken from another one, or sent in chunks and committed.

Each step is one request with a time limit of its own, so that whoever takes them can wait in the middle of a
large blob for a registry that says so, and try that step again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar
from urllib.parse import urlencode

from blockdev.errors import AccessDenied, SourceError
from blockdev.registry.auth import Scope
from blockdev.registry.exchange import Reply, Request, Task, origin

if TYPE_CHECKING:
    from blockdev.registry.client import Client

CHUNK = 8 << 20  # held in memory; S3 refuses parts below 5 MiB
PATIENCE = 120.0  # object stores assemble and hash what was uploaded before they answer
RATE = 16 << 10  # bytes a second; a chunk takes no longer than its bytes at this pace, and the patience
ANSWER_SECONDS = 30.0  # for a step that brings no bytes
_BYTES = {"Content-Type": "application/octet-stream"}
_Answer = TypeVar("_Answer")
_log = logging.getLogger(__name__)


class Attempt(Protocol):
    """Takes a step, and decides whether it is taken again when it fails."""

    def __call__(self, step: Callable[[], _Answer], /) -> _Answer: ...


def once(step: Callable[[], _Answer]) -> _Answer:
    """An Attempt."""
    return step()


class Upload:
    """begin() comes before send(), and commit() last. A step that fails may be taken again."""

    def __init__(self, client: Client, repository: str, digest: str = "") -> None:
        """Without a digest there is nothing to find or commit."""
        self.failed = f"pushing a blob failed: {client.registry}/{repository}{'@' if digest else ''}{digest}"
        self.sent = 0  # bytes
        self._client = client
        self._repository = repository
        self._digest = digest
        self._scope = Scope(repository, "pull,push")
        self._begin_at = client.url(repository, "blobs/uploads/")
        self._place = ""  # where the next request of this upload goes
        self._committing = False

    def find(self) -> bool:
        """Whether the repository has the blob."""
        request = Request("HEAD", self._client.blob_url(self._repository, self._digest))
        with self._client.follow(self._task(ANSWER_SECONDS), self._scope, request) as reply:
            if reply.status != 200:
                reply.require(404)
            return reply.status == 200

    def mount(self, other: str) -> bool:
        """Whether the registry has taken the blob from another repository of its own."""
        scope = Scope(self._repository, "pull,push", other)
        task = self._task(ANSWER_SECONDS)
        query = urlencode({"mount": self._digest, "from": other})
        request = Request("POST", f"{self._begin_at}?{query}", body=b"")
        try:
            with self._client.send(task, scope, request) as reply:
                if reply.told_to_wait is not None:
                    reply.require(201, 202)
                if reply.status != 202:
                    return reply.status == 201
                self._place = self._next(reply, task)
            self.abandon()
        except AccessDenied as error:  # to the other repository: then the blob has to be sent
            _log.info("no mount from repository=%s: %s", other, error)
        return False

    def begin(self) -> None:
        """The first step of sending."""
        task = self._task(ANSWER_SECONDS)
        with self._client.send(task, self._scope, Request("POST", self._begin_at, body=b"")) as reply:
            reply.require(202)
            self._place = self._next(reply, task)

    def abandon(self) -> None:
        """What has begun is not wanted. A registry that keeps it, since pushing is no right to delete, will drop it
        in its time."""
        place, self._place = self._place, ""
        scope = Scope(self._repository, "delete")
        try:
            with self._client.send(self._task(ANSWER_SECONDS), scope, Request("DELETE", place)):
                pass
        except (AccessDenied, SourceError) as error:
            _log.info("upload left behind repository=%s: %s", self._repository, error)

    def send(self, chunk: bytes) -> None:
        """The next bytes."""
        said = {"Content-Range": f"{self.sent}-{self.sent + len(chunk) - 1}"}
        request = Request("PATCH", self._place, _BYTES | said, chunk, PATIENCE)
        task = self._task(PATIENCE + len(chunk) / RATE)
        with self._client.send(task, self._scope, request) as reply:
            reply.require(202)
            self._place = self._next(reply, task)
        self.sent += len(chunk)

    def commit(self) -> None:
        """All was sent."""
        if self._committing and self.find():
            return  # the step failed when it was done
        self._committing = True
        place = f"{self._place}{'&' if '?' in self._place else '?'}digest={self._digest}"
        request = Request("PUT", place, _BYTES, b"", PATIENCE)
        with self._client.send(self._task(PATIENCE), self._scope, request) as reply:
            reply.require(201)

    def _next(self, reply: Reply, task: Task) -> str:
        if not reply.header("Location"):
            raise SourceError(f"{task.failed}: {origin(reply.url)} did not say where to upload to")
        return self._client.target(reply, task)

    def _task(self, seconds: float) -> Task:
        return Task(self.failed, time.monotonic() + seconds)
