# SPDX-License-Identifier: Apache-2.0
"""Registry, source, fetch threads, engine and cache together: what the registry is asked for."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from blockdev.cache import Cache, Entry
from blockdev.config import Policy
from blockdev.engine import Engine, EventKind, Priority
from blockdev.errors import SourceError
from blockdev.fetch.pool import REFUSED_DELAY, Pool
from blockdev.registry.backoff import Backoff
from blockdev.registry.client import Client
from blockdev.registry.credentials import Provider
from blockdev.source.blob import WHOLE_PAUSE, RegistryBlob
from formats import oci
from tests.fakes.blob_server import REPOSITORY, BlobServer
from tests.fakes.http_server import Answer, Ending, HttpServer, Seen, ranged
from tests.registries import Registry

CONTENT = os.urandom(5_000_000)
DIGEST = oci.digest_of(CONTENT)
WAIT = 20.0


class Bench:
    """An engine with its cache and fetch threads."""

    def __init__(self, folder: Path) -> None:
        self.engine = Engine(work_threads=1, readahead_extents=16)
        self.cache = Cache(folder, self.engine)
        self.backoff = Backoff()
        self.pool = Pool(self.engine, backoff=self.backoff)
        self.pool.start()
        self._opened: list[tuple[Entry, Client]] = []

    def open(self, host: str, policy: Policy, *, keep: bool = True) -> Entry:
        """keep: what passes by in a whole body goes to the cache."""
        entry = self.cache.open(DIGEST, len(CONTENT), policy)
        client = Client(host, Provider(), backoff=self.backoff)
        spill = entry.blob.store if keep else lambda offset, piece: 0
        self.pool.attach(entry.id, entry.blob, RegistryBlob(client, REPOSITORY, DIGEST, len(CONTENT), spill))
        self._opened.append((entry, client))
        return entry

    def open_from(self, registry: Registry) -> Entry:
        """The same, once a registry has the blob."""
        client = Client(registry.host, Provider())
        client.upload(REPOSITORY, DIGEST, len(CONTENT), io.BytesIO(CONTENT))
        client.close()
        return self.open(registry.host, Policy("eio", WAIT))

    def close(self) -> None:
        self.engine.stop()
        assert self.pool.join(WAIT)
        for entry, client in self._opened:
            self.pool.detach(entry.id)
            entry.close()
            client.close()
        self.engine.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "blobs")
    yield made
    made.close()


def in_threads(count: int, reader: Callable[[int], None]) -> None:
    errors: list[Exception] = []

    def run(number: int) -> None:
        try:
            reader(number)
        except (AssertionError, SourceError) as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT)
        assert not thread.is_alive()
    assert not errors


def test_no_byte_of_a_blob_is_asked_for_twice(bench: Bench, registry: Registry) -> None:
    entry = bench.open_from(registry)

    def reader(number: int) -> None:
        for offset in range(number * 17_000, len(CONTENT) - 40_000, 300_000):
            assert entry.blob.read_at(offset, 40_000) == CONTENT[offset : offset + 40_000]

    in_threads(6, reader)
    assert entry.blob.read_at(0, len(CONTENT)) == CONTENT
    assert sum(registry.ranges(DIGEST)) == len(CONTENT)
    assert registry.whole_gets(DIGEST) == 0


def test_a_pull_and_two_readers_ask_for_each_byte_once(bench: Bench, registry: Registry) -> None:
    entry = bench.open_from(registry)
    entry.blob.prefetch(0, len(CONTENT), Priority.BULK)

    def reader(number: int) -> None:
        for offset in range(0, len(CONTENT), piece := 50_000 + number * 7_000):
            length = min(piece, len(CONTENT) - offset)
            assert entry.blob.read_at(offset, length) == CONTENT[offset : offset + length]

    in_threads(2, reader)
    assert sum(registry.ranges(DIGEST)) == len(CONTENT)
    assert registry.whole_gets(DIGEST) == 0


@pytest.mark.parametrize("content_gate", [False, True])
def test_a_registry_without_ranges_is_downloaded_once(bench: Bench, content_gate: bool) -> None:
    with BlobServer(CONTENT) as server:
        server.ignores_ranges = True
        if content_gate:
            server.gate, server.hold_at = threading.Event(), 2_000_000
            threading.Timer(0.3, server.gate.set).start()
        entry = bench.open(server.host, Policy("eio", WAIT))

        def reader(number: int) -> None:
            for offset in range(number * 17_000, len(CONTENT) - 40_000, 300_000):
                assert entry.blob.read_at(offset, 40_000) == CONTENT[offset : offset + 40_000]

        in_threads(12, reader)
        assert entry.blob.read_at(0, len(CONTENT)) == CONTENT
        assert len(server.gets) == 1


def test_a_registry_that_limits_us_is_left_alone_for_as_long_as_it_says(bench: Bench) -> None:
    with BlobServer(CONTENT) as server:
        server.next_answers.extend(Answer(429, {"Retry-After": "1"}) for _ in range(2))
        entry = bench.open(server.host, Policy("eio", WAIT))
        begin = time.monotonic()

        def reader(number: int) -> None:
            assert entry.blob.read_at(number * 300_000, 10) == CONTENT[number * 300_000 :][:10]

        in_threads(8, reader)
        assert time.monotonic() - begin >= 2
        assert len(server.gets) <= 2 + 8


def test_a_registry_that_returns_is_read_on_without_reopening(bench: Bench, registry: Registry) -> None:
    client = Client(registry.host, Provider())
    client.upload(REPOSITORY, DIGEST, len(CONTENT), io.BytesIO(CONTENT))
    client.close()
    entry = bench.open(registry.host, Policy("retry", 0.5))
    assert entry.blob.read_at(0, 100) == CONTENT[:100]
    registry.stop()
    with pytest.raises(SourceError):
        entry.blob.read_at(4_000_000, 100)
    assert entry.blob.read_at(0, 100) == CONTENT[:100]
    registry.start()
    deadline = time.monotonic() + WAIT
    while True:
        try:
            assert entry.blob.read_at(4_000_000, 100) == CONTENT[4_000_000:4_000_100]
            return
        except SourceError:
            assert time.monotonic() < deadline


def test_a_blob_that_is_denied_is_not_asked_for_at_each_miss(bench: Bench) -> None:
    with BlobServer(CONTENT) as server:
        entry = bench.open(server.host, Policy("eio", WAIT))
        assert entry.blob.read_at(0, 10) == CONTENT[:10]
        asked, begin = len(server.seen), time.monotonic()
        server.next_answers.extend(Answer(403) for _ in range(100))
        for number in range(20):
            with pytest.raises(SourceError):
                entry.blob.read_at(2_000_000 + number * 65_536, 10)
        # The first is refused the engine, and once more to whoever asks why.
        assert len(server.seen) - asked <= 2 + (time.monotonic() - begin) / REFUSED_DELAY


def test_no_ranges_and_no_cache_does_not_mean_a_download_for_each_miss(bench: Bench) -> None:
    with BlobServer(CONTENT) as server:
        server.ignores_ranges = True
        entry = bench.open(server.host, Policy("retry", 0.2), keep=False)
        begin = time.monotonic()
        right = 0
        for number in range(20):
            with contextlib.suppress(SourceError):
                assert entry.blob.read_at(number * 200_000, 10) == CONTENT[number * 200_000 :][:10]
                right += 1
        assert right
        assert len(server.gets) <= 1 + math.log2(1 + (time.monotonic() - begin) / WHOLE_PAUSE)


def test_closing_a_blob_is_no_failure_of_its_registry(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    stalls = False

    def answer(seen: Seen) -> Answer:
        found = ranged(seen, CONTENT)
        return replace(found, cut=10, ending=Ending.STALL) if stalls else found

    with HttpServer(answer) as server:
        entry = bench.open(server.host, Policy("eio", WAIT))
        assert entry.blob.read_at(0, 10) == CONTENT[:10]
        stalls, asked = True, len(server.seen)
        entry.blob.prefetch(2_000_000, 10, Priority.PREFETCH)
        _await(lambda: len(server.seen) > asked)
        stalls = False
        bench.pool.detach(entry.id)
        entry.close()
        _await(lambda: any(connection.fileno() < 0 for connection in server.connections))
        other = bench.open(server.host, Policy("eio", WAIT))
        assert other.blob.read_at(2_000_000, 10) == CONTENT[2_000_000:2_000_010]
        events = []
        while event := bench.engine.next_event():
            events.append(event.kind)
        bench.engine.stop()
        assert bench.pool.join(WAIT)
        assert EventKind.BLOB_FAILING not in events
        assert bench.backoff.waiting(server.host) == 0
        assert bench.pool.failure(entry.id) is None
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def _await(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
