# SPDX-License-Identifier: Apache-2.0
"""Ranges that the engine gets by itself: one GET filled into a fetch, and whatever a server answers instead."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev.cache import Cache
from blockdev.config import Policy
from blockdev.engine import Engine, EngineStopped, Fetch, HttpTarget, Priority, Refusal, Trust
from blockdev.errors import SourceError
from blockdev.fetch.pool import Pool
from blockdev.registry.client import Client
from blockdev.registry.credentials import Provider
from blockdev.source.blob import RegistryBlob
from tests.authority import Authority
from tests.fakes.blob_server import REPOSITORY, BlobServer
from tests.fakes.http_server import Answer, HttpServer, Seen, ranged

EXTENT = 65536
CONTENT = os.urandom(9 * EXTENT + 1234)
WAIT = 20.0
SECRET = "s3cr3t"


class Desk:
    """An engine with one empty blob, whose fetches are taken by hand."""

    def __init__(self, folder: Path) -> None:
        self.engine = Engine(work_threads=1, readahead_extents=0)
        digest = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
        self.entry = Cache(folder, self.engine).open(digest, len(CONTENT), Policy("eio", WAIT))
        self._taken: list[Fetch] = []

    def fetch(self, first: int, count: int) -> Fetch:
        """Extents on loan."""
        self.entry.blob.prefetch(first * EXTENT, min(count * EXTENT, len(CONTENT) - first * EXTENT), Priority.BULK)
        fetch = self.engine.next_fetch(Priority.BULK, timeout=WAIT)
        assert fetch is not None
        self._taken.append(fetch)
        return fetch

    def close(self) -> None:
        for fetch in self._taken:
            fetch.finish(5)
        self.engine.stop()
        self.entry.close()
        self.engine.close()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path / "blobs")
    yield made
    made.close()


def target(url: str, *headers: str, trust: Trust | None = None, stall: float = WAIT) -> HttpTarget:
    return HttpTarget(
        "reading failed: it", url, headers, proxy="", trust=trust or Trust(), connect=WAIT, stall=stall, slowest=1024
    )


def obedient(seen: Seen) -> Answer:
    return ranged(seen, CONTENT)


def test_it_is_the_range_and_the_blob_has_it(desk: Desk) -> None:
    with HttpServer(obedient) as server:
        at = target(f"{server.url}/a/../b?x=1", "User-Agent: one", "Authorization: Basic abc")
        for first, count in ((0, 1), (3, 2), (8, 2)):
            assert desk.fetch(first, count).get(at, timeout=WAIT) is None
            end = min((first + count) * EXTENT, len(CONTENT))
            got = desk.entry.blob.read_at(first * EXTENT, end - first * EXTENT)
            assert got == CONTENT[first * EXTENT : end]
        assert {(seen.path, seen.query) for seen in server.seen} == {("/a/../b", "x=1")}
        assert [seen.range for seen in server.seen][2] == (8 * EXTENT, len(CONTENT) - 1)
        assert {seen.headers["authorization"] for seen in server.seen} == {"Basic abc"}
        assert len({seen.port for seen in server.seen}) == 1, "the connection is kept"


WRONG = [
    Answer(200, {}, CONTENT),
    Answer(206, {"Content-Range": f"bytes 1-{EXTENT}/{len(CONTENT)}"}, CONTENT[1 : EXTENT + 1]),
    Answer(206, {"Content-Range": f"bytes 0-{EXTENT - 1}/{len(CONTENT) + 1}"}, CONTENT[:EXTENT]),
    Answer(206, {"Content-Range": "bytes */*"}, CONTENT[:EXTENT]),
    Answer(206, {}, CONTENT[:EXTENT]),
    Answer(206, {"Content-Range": f"bytes 0-{EXTENT - 1}/{len(CONTENT)}", "Content-Encoding": "gzip"}, bytes(EXTENT)),
    Answer(307, {"Location": "/elsewhere"}),
    Answer(401, {"WWW-Authenticate": "Basic realm=x"}, b"who?"),
    Answer(416, {"Content-Length": str(len(CONTENT))}, b"no", cut=2),
    Answer(503, {"Retry-After": "7"}, b"later"),
]


@pytest.mark.parametrize("answer", WRONG, ids=lambda answer: f"{answer.status}-{len(answer.headers)}")
def test_another_answer_is_told_and_nothing_is_taken_of_it(desk: Desk, answer: Answer) -> None:
    with HttpServer(lambda seen: answer) as server:
        fetch = desk.fetch(0, 1)
        refusal = fetch.get(target(server.url), timeout=WAIT)
        assert refusal == Refusal(answer.status, answer.headers.get("Retry-After", ""))
        assert desk.entry.blob.stat().present_bytes == 0
        assert len(server.seen) == 1, "no redirect is followed, nothing is tried again"
        server.answer = obedient
        assert fetch.get(target(server.url), timeout=WAIT) is None
        assert desk.entry.blob.read_at(0, EXTENT) == CONTENT[:EXTENT]


def test_a_range_that_does_not_say_the_blobs_size_is_taken(desk: Desk) -> None:
    answer = Answer(206, {"Content-Range": f"bytes 0-{EXTENT - 1}/*"}, CONTENT[:EXTENT])
    with HttpServer(lambda seen: answer) as server:
        assert desk.fetch(0, 1).get(target(server.url), timeout=WAIT) is None
        assert desk.entry.blob.read_at(0, EXTENT) == CONTENT[:EXTENT]


def test_what_came_before_the_end_stays_and_the_rest_is_asked_for(desk: Desk) -> None:
    with HttpServer(obedient) as server:
        fetch = desk.fetch(0, 4)
        server.answer = lambda seen: Answer(206, obedient(seen).headers, obedient(seen).body, cut=2 * EXTENT + 100)
        with pytest.raises(SourceError, match="ended early"):
            fetch.get(target(server.url), timeout=WAIT)
        assert desk.entry.blob.stat().present_bytes == 2 * EXTENT
        server.answer = obedient
        assert fetch.get(target(server.url), timeout=WAIT) is None
        assert server.seen[-1].range == (2 * EXTENT, 4 * EXTENT - 1)
        assert desk.entry.blob.read_at(0, 4 * EXTENT) == CONTENT[: 4 * EXTENT]


def test_a_body_longer_than_its_range_is_cut_off(desk: Desk) -> None:
    with HttpServer(lambda seen: Answer(206, obedient(seen).headers, obedient(seen).body + bytes(5 << 20))) as server:
        for first in (0, 1):
            desk.fetch(2 * first, 1).get(target(server.url), timeout=WAIT)
            assert desk.entry.blob.read_at(2 * first * EXTENT, EXTENT) == CONTENT[2 * first * EXTENT :][:EXTENT]
        assert desk.entry.blob.stat().present_bytes == 2 * EXTENT


def test_headers_without_end_are_not_read(desk: Desk) -> None:
    many = {f"X-{number}": "x" * 1000 for number in range(90)}
    with (
        HttpServer(lambda seen: Answer(206, many | obedient(seen).headers, obedient(seen).body)) as server,
        pytest.raises(SourceError, match="its head"),
    ):
        desk.fetch(0, 1).get(target(server.url), timeout=WAIT)


def test_a_body_that_stalls_is_given_up_and_what_came_stays(desk: Desk) -> None:
    held = threading.Event()

    def stalls(seen: Seen) -> Answer:
        good = obedient(seen)
        return Answer(206, good.headers, good.body, gate=held, hold_at=EXTENT + 10)

    with HttpServer(stalls) as server:
        with pytest.raises(SourceError, match="no answer in time"):
            desk.fetch(0, 2).get(target(server.url, stall=0.1), timeout=WAIT)
        with pytest.raises(SourceError):
            desk.fetch(4, 2).get(target(server.url), timeout=0.1)
        held.set()
    assert desk.entry.blob.read_at(0, EXTENT) == CONTENT[:EXTENT]


def test_stopping_the_engine_ends_a_transfer(desk: Desk) -> None:
    arrived, held = threading.Event(), threading.Event()

    def holds(seen: Seen) -> Answer:
        arrived.set()
        return Answer(206, obedient(seen).headers, obedient(seen).body, gate=held)

    with HttpServer(holds) as server:
        ended: list[Exception] = []

        def get(fetch: Fetch) -> None:
            try:
                fetch.get(target(server.url), timeout=10 * WAIT)
            except EngineStopped as error:
                ended.append(error)

        thread = threading.Thread(target=get, args=(desk.fetch(0, 1),))
        thread.start()
        assert arrived.wait(WAIT)
        desk.engine.stop()
        thread.join(WAIT)
        held.set()
        assert ended


def test_a_thread_that_waits_in_vain_keeps_no_connection(desk: Desk) -> None:
    with HttpServer(obedient) as server:
        desk.fetch(0, 1).get(target(server.url), timeout=WAIT)
        assert desk.engine.next_fetch(Priority.BULK, timeout=0) is None
        desk.fetch(2, 1).get(target(server.url), timeout=WAIT)
        assert len({seen.port for seen in server.seen}) == 2


def test_only_trusted_servers_are_read_from(desk: Desk, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    known = Trust(authority.root.pem.encode())
    with HttpServer(obedient, authority.server("127.0.0.1").server_context()) as server:
        fetch = desk.fetch(0, 1)
        for trust in (Trust(), Trust(b"nothing of a certificate\n")):
            with pytest.raises(SourceError):
                fetch.get(target(server.url, trust=trust), timeout=WAIT)
        assert fetch.get(target(server.url, trust=known), timeout=WAIT) is None
        with pytest.raises(SourceError):  # not by way of the connection that is open
            desk.fetch(2, 1).get(target(server.url), timeout=WAIT)
        assert len(server.seen) == 1
    with HttpServer(obedient, authority.server("elsewhere").server_context()) as server:
        with pytest.raises(SourceError):
            desk.fetch(4, 1).get(target(server.url, trust=known), timeout=WAIT)
        assert not server.seen


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/x?sig=" + SECRET, "file:///etc/passwd", "gopher://x/"])
def test_what_fails_is_said_without_the_query(desk: Desk, url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(SourceError) as raised:
        desk.fetch(0, 1).get(target(url.format(port=port), f"Authorization: Bearer {SECRET}"), timeout=WAIT)
    assert SECRET not in str(raised.value)
    assert str(raised.value).startswith("reading failed: it: ")


# ---- with everything around it -----------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[BlobServer]:
    with BlobServer(CONTENT) as server:
        yield server


class Node:
    """A blob of a server, read through the cache."""

    def __init__(self, folder: Path, server: BlobServer) -> None:
        self.engine = Engine(work_threads=1, readahead_extents=0)
        self.pool = Pool(self.engine, threads=2)
        self.pool.start()
        self.client = Client(server.host, Provider())
        self.entry = Cache(folder, self.engine).open(server.digest, len(CONTENT), Policy("retry", WAIT))
        source = RegistryBlob(self.client, REPOSITORY, server.digest, len(CONTENT), self.entry.blob.store)
        self.pool.attach(self.entry.id, self.entry.blob, source)

    def check(self, *extents: int) -> None:
        for extent in extents:
            assert self.entry.blob.read_at(extent * EXTENT, 100) == CONTENT[extent * EXTENT :][:100]

    def close(self) -> None:
        self.engine.stop()
        assert self.pool.join(WAIT)
        self.pool.detach(self.entry.id)
        self.entry.close()
        self.client.close()
        self.engine.close()


@pytest.fixture
def node(tmp_path: Path, server: BlobServer) -> Iterator[Node]:
    made = Node(tmp_path / "blobs", server)
    yield made
    made.close()


def test_a_redirect_that_expires_is_asked_for_again(node: Node, server: BlobServer) -> None:
    server.redirects = True
    node.check(0, 2, 4)
    assert len(server.gets) == 1, "the first one finds the way"
    server.expire()
    node.check(6, 8)
    assert all("authorization" not in seen.headers for seen in server.store.seen)
    assert server.store.seen[-1].query == "signature=1"


def test_a_registry_that_ignores_ranges_from_now_on_sends_its_blob_once(node: Node, server: BlobServer) -> None:
    node.check(0)
    server.ignores_ranges = True
    node.check(2, 4, 6, 8)
    assert len(server.gets) <= 3  # the range, the refusal, the whole


def test_a_registry_that_has_moved_its_blobs_is_followed(node: Node, server: BlobServer) -> None:
    node.check(0, 2)
    server.redirects = True
    node.check(4, 6, 8)
    assert [seen.range is not None for seen in server.store.seen] == [True] * 3


@pytest.mark.parametrize("answer", WRONG[1:6], ids=lambda answer: str(len(answer.headers)))
def test_a_part_that_is_another_than_was_asked_for_is_asked_for_again(
    node: Node, server: BlobServer, answer: Answer
) -> None:
    node.check(0)
    server.next_answers.append(answer)
    node.check(2, 4)


def test_each_failure_is_got_over(node: Node, server: BlobServer) -> None:
    node.check(0)
    server.next_answers.extend(Answer(status) for status in (500, 404 + 12, 400))
    begin = time.monotonic()
    node.check(2, 4, 6)
    assert time.monotonic() - begin < WAIT
