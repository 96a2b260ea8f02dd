# SPDX-License-Identifier: Apache-2.0
"""A registry with one blob in it, and as many bad habits as a test wants."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from typing import Self

from tests.fakes.http_server import PIECE_WAIT, Answer, HttpServer, Seen, ranged

REPOSITORY = "app"


class BlobServer:
    """Serves `content` as a blob of REPOSITORY.

    `next_answers` replace the next answers to GETs of the blob. `ignores_ranges`: 200 and the
    whole blob. `redirects`: to a signed URL of `store`, another server, until expire() is called.
    `well` off: 503 to everything.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self.next_answers: deque[Answer] = deque()
        self.ignores_ranges = False
        self.redirects = False
        self.well = True
        self.gate: threading.Event | None = None  # holds whole bodies back, from byte hold_at on
        self.hold_at = 0
        self.before_answer: threading.Event | None = None  # holds every answer back
        self._signature = 0
        self._registry = HttpServer(self._answer)
        self.store = HttpServer(self._answer_signed)

    @property
    def host(self) -> str:
        return self._registry.host

    @property
    def gets(self) -> list[Seen]:
        """GETs of the blob that reached the registry itself."""
        return [seen for seen in self._registry.seen if seen.method == "GET" and "/blobs/" in seen.path]

    @property
    def seen(self) -> list[Seen]:
        return self._registry.seen

    def expire(self) -> None:
        """All URLs signed so far are refused from now on."""
        self._signature += 1

    def _answer(self, seen: Seen) -> Answer:
        if self.before_answer:
            self.before_answer.wait(PIECE_WAIT)
        if not self.well:
            return Answer(503)
        if seen.path != f"/v2/{REPOSITORY}/blobs/{self.digest}":
            return Answer(404)
        if seen.method == "GET" and self.next_answers:
            return self.next_answers.popleft()
        if self.redirects:
            return Answer(307, {"Location": f"{self.store.url}/blob?signature={self._signature}"})
        if self.ignores_ranges:
            return Answer(200, {}, self.content, gate=self.gate, hold_at=self.hold_at)
        return ranged(seen, self.content)

    def _answer_signed(self, seen: Seen) -> Answer:
        if not self.well:
            return Answer(503)
        if seen.query != f"signature={self._signature}" or "authorization" in seen.headers:
            return Answer(403, {}, b"<Error><Code>AccessDenied</Code></Error>")  # as S3 does
        return ranged(seen, self.content)

    def close(self) -> None:
        self._registry.close()
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()
