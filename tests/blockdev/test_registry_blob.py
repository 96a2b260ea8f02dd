# SPDX-License-Identifier: Apache-2.0
"""A blob in a registry that does not behave: ranges ignored, bodies cut, targets that expire."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from blockdev.errors import NotFound, SourceError
from blockdev.registry.backoff import LeftAlone
from blockdev.registry.client import Client
from blockdev.registry.credentials import Provider
from blockdev.source import Spilled
from blockdev.source.blob import SPILL_SIZE, RegistryBlob
from formats import oci
from tests.fakes.blob_server import REPOSITORY, BlobServer
from tests.fakes.http_server import Answer
from tests.registries import Registry

CONTENT = os.urandom(4 * SPILL_SIZE + 4321)
WAIT = 20.0


class Sink:
    """What a cache does with spilled bytes: keep them."""

    def __init__(self) -> None:
        self.content = bytearray(len(CONTENT))
        self.spilled: list[tuple[int, int]] = []

    def __call__(self, offset: int, piece: memoryview) -> None:
        self.content[offset : offset + len(piece)] = piece
        self.spilled.append((offset, len(piece)))


class Reader(threading.Thread):
    """Reads one range in a thread. `outcome` is what came of it: the bytes or the error."""

    def __init__(self, blob: RegistryBlob, offset: int, length: int, seconds: float = WAIT) -> None:
        super().__init__(daemon=True)
        self.offset, self.length = offset, length
        self.outcome: bytes | Exception | None = None
        self.filled = 0
        self.started = threading.Event()
        self._read = (blob, time.monotonic() + seconds)
        self.start()

    def run(self) -> None:
        blob, deadline = self._read
        buffer = bytearray(self.length)
        self.started.set()
        try:
            blob.read_into(self.offset, memoryview(buffer), deadline=deadline, progress=self._progress)
        except SourceError as error:
            self.outcome = error
        else:
            self.outcome = bytes(buffer)

    def _progress(self, filled: int) -> None:
        self.filled = filled

    def result(self) -> bytes | Exception | None:
        self.join(WAIT)
        assert not self.is_alive()
        return self.outcome

    @property
    def wanted(self) -> bytes:
        return CONTENT[self.offset : self.offset + self.length]


@pytest.fixture
def server() -> Iterator[BlobServer]:
    with BlobServer(CONTENT) as server:
        yield server


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def blob(server: BlobServer, sink: Sink) -> Iterator[RegistryBlob]:
    client = Client(server.host, Provider())
    yield RegistryBlob(client, REPOSITORY, server.digest, len(CONTENT), sink)
    client.close()


def read(blob: RegistryBlob, offset: int = 0, length: int = 100) -> bytes:
    result = Reader(blob, offset, length).result()
    if isinstance(result, Exception):
        raise result
    assert result is not None
    return result


def read_unspilled(blob: RegistryBlob, offset: int = 0, length: int = 100) -> bytes:
    """As a reader that does not find in the cache what was spilled."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        with contextlib.suppress(Spilled, LeftAlone):
            return read(blob, offset, length)
    raise AssertionError("what was spilled is never forgotten")


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# ---- ranges ignored ------------------------------------------------------------------------------


def test_a_registry_that_ignores_ranges_is_read_once(server: BlobServer, blob: RegistryBlob, sink: Sink) -> None:
    server.ignores_ranges = True
    readers = [Reader(blob, number * 100_000, 90_000) for number in range(10)]
    for reader in readers:
        outcome = reader.result()
        if isinstance(outcome, Spilled):
            outcome = bytes(sink.content[reader.offset : reader.offset + reader.length])
        assert outcome == reader.wanted
    assert len(server.gets) == 1
    assert sink.content == CONTENT
    assert sink.spilled == [
        (start, min(SPILL_SIZE, len(CONTENT) - start)) for start in range(0, len(CONTENT), SPILL_SIZE)
    ]


def test_the_reader_that_started_a_stream_need_not_wait_for_its_end(server: BlobServer, blob: RegistryBlob) -> None:
    server.ignores_ranges = True
    server.gate, server.hold_at = threading.Event(), 2 * SPILL_SIZE
    reader = Reader(blob, 1000, SPILL_SIZE)
    until(lambda: reader.filled == SPILL_SIZE)
    assert reader.is_alive()
    server.gate.set()
    assert reader.result() == reader.wanted


def test_a_reader_whose_range_has_gone_by_is_told_at_once(server: BlobServer, blob: RegistryBlob, sink: Sink) -> None:
    server.ignores_ranges = True
    server.gate, server.hold_at = threading.Event(), 3 * SPILL_SIZE
    first = Reader(blob, 0, 10)
    until(lambda: len(server.gets) == 1)
    near, far = Reader(blob, SPILL_SIZE, 100), Reader(blob, 3 * SPILL_SIZE + 5, 100)
    assert isinstance(near.result(), Spilled)
    assert sink.content[SPILL_SIZE : SPILL_SIZE + 100] == near.wanted
    assert far.is_alive()
    late = Reader(blob, 100, 100)
    assert isinstance(late.result(), Spilled)
    server.gate.set()
    assert first.result() == first.wanted
    assert isinstance(far.result(), Spilled)
    assert len(server.gets) == 1


def test_a_stream_that_is_over_is_soon_forgotten(server: BlobServer, blob: RegistryBlob) -> None:
    server.ignores_ranges = True
    assert read(blob, 5) == CONTENT[5:105]
    with pytest.raises(Spilled):
        read(blob, 5)
    assert len(server.gets) == 1
    assert read_unspilled(blob, 5) == CONTENT[5:105], "what was spilled may have been evicted since"
    assert len(server.gets) == 2


def test_a_stream_that_breaks_has_failed_for_all_that_waited(
    server: BlobServer, blob: RegistryBlob, sink: Sink
) -> None:
    server.ignores_ranges = True
    gate = threading.Event()
    server.next_answers.append(Answer(200, {}, CONTENT, cut=2 * SPILL_SIZE, gate=gate, hold_at=SPILL_SIZE))
    first = Reader(blob, 3 * SPILL_SIZE, 10)
    until(lambda: sink.spilled)
    waiting = [Reader(blob, 3 * SPILL_SIZE + number, 10) for number in range(1, 5)]
    for reader in waiting:
        reader.started.wait(WAIT)
    gate.set()
    assert "ended early" in str(first.result())
    for reader in waiting:
        outcome = reader.result()
        assert outcome == reader.wanted or "ended early" in str(outcome)  # who came late starts anew
    assert read_unspilled(blob, 3 * SPILL_SIZE, 10) == first.wanted


def test_a_stream_ends_when_the_blob_is_closed(server: BlobServer, blob: RegistryBlob) -> None:
    server.ignores_ranges = True
    server.gate, server.hold_at = threading.Event(), SPILL_SIZE
    reader = Reader(blob, 0, 10)
    until(lambda: reader.filled == 10)
    blob.close()
    server.gate.set()
    assert "being closed" in str(reader.result())


def test_who_waits_for_a_stream_keeps_its_own_deadline(server: BlobServer, blob: RegistryBlob) -> None:
    server.ignores_ranges = True
    server.gate, server.hold_at = threading.Event(), SPILL_SIZE
    first = Reader(blob, 0, 10)
    until(lambda: first.filled == 10)
    second = Reader(blob, 3 * SPILL_SIZE, 10, seconds=0.1)
    assert "no time left" in str(second.result())
    server.gate.set()
    first.result()


def test_what_the_spill_raises_ends_the_read(server: BlobServer) -> None:
    def full(offset: int, piece: memoryview) -> None:
        raise OSError("stopped")

    server.ignores_ranges = True
    client = Client(server.host, Provider())
    blob = RegistryBlob(client, REPOSITORY, server.digest, len(CONTENT), full)
    for _ in range(2):  # the second one must not wait for the first for ever
        with pytest.raises(OSError, match="stopped"):
            blob.read_into(0, memoryview(bytearray(10)), deadline=time.monotonic() + WAIT, progress=lambda filled: None)
    client.close()


def test_a_mirror_that_fetches_first_sends_the_whole_and_then_ranges(
    registries: Callable[..., Registry], sink: Sink
) -> None:
    upstream = registries()
    client = Client(upstream.host, Provider())
    digest = oci.digest_of(CONTENT)
    client.upload(REPOSITORY, digest, len(CONTENT), io.BytesIO(CONTENT))
    mirror = registries(proxy_of=f"http://{upstream.host}")
    blob = RegistryBlob(Client(mirror.host, Provider()), REPOSITORY, digest, len(CONTENT), sink)
    assert read(blob, 300_000, 1000) == CONTENT[300_000:301_000]
    assert sink.content == CONTENT

    def by_ranges() -> bool:
        assert read_unspilled(blob, 300_000, 1000) == CONTENT[300_000:301_000]
        return 1000 in mirror.ranges(digest)

    until(by_ranges)  # the mirror writes its own copy after it has answered
    assert upstream.whole_gets(digest) >= 1


# ---- the first request -------------------------------------------------------------------------------


def test_the_first_request_is_alone_until_it_is_answered(server: BlobServer, blob: RegistryBlob) -> None:
    gate, server.before_answer = threading.Event(), threading.Event()
    head = {"Content-Range": f"bytes 0-99/{len(CONTENT)}"}
    server.next_answers.append(Answer(206, head, CONTENT[:100], gate=gate, hold_at=10))
    first = Reader(blob, 0, 100)
    until(lambda: len(server.gets) == 1)
    others = [Reader(blob, number * 1000, 100) for number in range(1, 6)]
    for other in others:
        other.started.wait(WAIT)
    assert len(server.gets) == 1
    server.before_answer.set()
    for other in others:
        assert other.result() == other.wanted, "the head of the answer is enough to go on"
    assert first.is_alive()
    gate.set()
    assert first.result() == first.wanted


def test_a_first_request_that_fails_has_failed_for_all_that_waited(server: BlobServer, blob: RegistryBlob) -> None:
    server.before_answer = threading.Event()
    server.next_answers.append(Answer(429, {"Retry-After": "7"}))
    readers = [Reader(blob, number * 1000, 100) for number in range(5)]
    until(lambda: len(server.gets) == 1 and all(reader.started.is_set() for reader in readers))
    until(lambda: len(blob._turn._waiters) == 4)  # type: ignore[attr-defined]
    server.before_answer.set()
    for reader in readers:
        outcome = reader.result()
        assert isinstance(outcome, SourceError)
        assert outcome.retry_after == 7
    with pytest.raises(LeftAlone):
        read(blob)
    assert len(server.gets) == 1, "a host that told us to wait is not asked"


# ---- the wrong blob ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_a_blob_of_another_size_is_not_read(server: BlobServer, ignores_ranges: bool, sink: Sink) -> None:
    server.ignores_ranges = ignores_ranges
    blob = RegistryBlob(Client(server.host, Provider()), REPOSITORY, server.digest, len(CONTENT) - 1, sink)
    with pytest.raises(SourceError, match=f"the registry has {len(CONTENT)} bytes"):
        read(blob)
    with pytest.raises(SourceError):
        blob.probe(time.monotonic() + WAIT)
    assert not sink.spilled


def test_a_blob_that_is_gone_is_not_found(server: BlobServer, sink: Sink) -> None:
    blob = RegistryBlob(Client(server.host, Provider()), "elsewhere", server.digest, len(CONTENT), sink)
    with pytest.raises(NotFound):
        blob.read_into(0, memoryview(bytearray(10)), deadline=time.monotonic() + WAIT, progress=lambda filled: None)


def test_a_body_that_is_cut_short_is_an_error_and_its_start_counts(server: BlobServer, blob: RegistryBlob) -> None:
    head = {"Content-Range": f"bytes 0-199999/{len(CONTENT)}"}
    server.next_answers.append(Answer(206, head, CONTENT[:200_000], cut=150_000))
    reader = Reader(blob, 0, 200_000)
    assert isinstance(reader.result(), SourceError)
    assert 65536 <= reader.filled <= 150_000


# ---- redirects that expire -------------------------------------------------------------------------------


def test_a_target_that_has_expired_is_asked_for_again(server: BlobServer, blob: RegistryBlob) -> None:
    server.redirects = True
    for _ in range(3):
        assert read(blob, 7) == CONTENT[7:107]
    assert len(server.gets) == 1
    server.expire()
    for _ in range(3):
        assert read(blob, 7) == CONTENT[7:107]
    assert len(server.gets) == 2


def test_a_target_that_never_works_fails_for_now_and_its_signature_is_not_shown(
    server: BlobServer, blob: RegistryBlob
) -> None:
    server.redirects = True
    server.store.answer = lambda seen: Answer(403)
    with pytest.raises(SourceError, match="answered 403") as caught:
        blob.read_into(0, memoryview(bytearray(10)), deadline=time.monotonic() + WAIT, progress=lambda filled: None)
    assert "signature" not in str(caught.value)
    assert server.store.host in str(caught.value)


def test_a_store_that_dies_is_asked_for_again(server: BlobServer, blob: RegistryBlob) -> None:
    server.redirects = True
    assert read(blob) == CONTENT[:100]
    server.store.close()
    with pytest.raises(SourceError):
        read(blob)
    server.redirects = False
    assert read(blob) == CONTENT[:100]
