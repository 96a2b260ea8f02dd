# SPDX-License-Identifier: Apache-2.0
"""Misses are answered by sources, whatever the sources do."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev.cache import Cache, Entry
from blockdev.config import Policy
from blockdev.engine import Engine, EngineStopped, EventKind, Priority
from blockdev.errors import EngineError, NotFound, SourceError
from blockdev.fetch import pool as pool_module
from blockdev.fetch.pool import Pool
from blockdev.source import Spilled
from tests.fakes.memory_source import MemorySource

CONTENT = random.Random(1).randbytes(3_000_000)
WAIT = 20.0  # seconds a condition may take on a busy machine
EXTENT = 65536


class Bench:
    """An engine with a pool, a cache, and one blob from one source."""

    def __init__(self, folder: Path) -> None:
        self.engine = Engine(work_threads=1, readahead_extents=0)
        self.cache = Cache(folder, self.engine)
        self.pool = Pool(self.engine, threads=3)
        self.pool.start()
        self.source = MemorySource(CONTENT)
        self.entry = self.open(Policy("retry", WAIT))

    def open(self, policy: Policy) -> Entry:
        digest = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
        entry = self.cache.open(digest, len(CONTENT), policy)
        self.pool.attach(entry.id, entry.blob, self.source)
        return entry

    def close(self) -> None:
        self.source.gate.set()
        self.engine.stop()
        assert self.pool.join(WAIT)
        self.pool.detach(self.entry.id)
        self.entry.close()
        self.engine.close()

    def await_event(self, kind: EventKind) -> None:
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline:
            event = self.engine.next_event()
            if event and event.kind is kind:
                assert event.id == self.entry.id
                return
            time.sleep(0.005)
        pytest.fail(f"no {kind.name} event")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "blobs")
    yield made
    made.close()


def _await(condition: object) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_miss_is_answered_and_asked_for_once(bench: Bench) -> None:
    assert bench.entry.blob.read_at(100_000, 300_000) == CONTENT[100_000:400_000]
    assert bench.source.reads == [(EXTENT, 6 * EXTENT)]
    assert bench.entry.blob.read_at(100_000, 300_000) == CONTENT[100_000:400_000]
    assert len(bench.source.reads) == 1


def test_a_failure_is_retried_until_the_source_delivers(bench: Bench) -> None:
    bench.source.failures.extend(SourceError("read: memory: reset") for _ in range(3))
    assert bench.entry.blob.read_at(0, 10) == CONTENT[:10]
    assert len(bench.source.reads) == 4


def test_what_arrived_before_a_failure_is_not_asked_for_again(bench: Bench) -> None:
    whole = bench.source.read_into

    def half(offset, buffer, *, deadline, progress):  # type: ignore[no-untyped-def]
        bench.source.read_into = whole  # type: ignore[method-assign]
        whole(offset, buffer[: 2 * EXTENT], deadline=deadline, progress=progress)
        raise SourceError("read: memory: cut off")

    bench.source.read_into = half  # type: ignore[method-assign]
    assert bench.entry.blob.read_at(0, 4 * EXTENT) == CONTENT[: 4 * EXTENT]
    assert bench.source.reads == [(0, 2 * EXTENT), (2 * EXTENT, 2 * EXTENT)]


def test_a_blob_that_is_not_there_fails_at_once(bench: Bench) -> None:
    bench.source.failures.append(NotFound("read: memory: no such blob"))
    start = time.monotonic()
    with pytest.raises(SourceError):
        bench.entry.blob.read_at(0, 10)
    assert time.monotonic() - start < WAIT / 2
    assert len(bench.source.reads) == 1


def test_a_defect_of_a_source_fails_the_read_and_leaves_the_thread_alive(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.source.failures.extend(KeyError("https://cdn/blob?signature=secret") for _ in range(5))
    for _ in range(5):
        with pytest.raises(SourceError):
            bench.entry.blob.read_at(0, 10)
    assert bench.entry.blob.read_at(0, 10) == CONTENT[:10]
    assert "KeyError" in caplog.text
    assert "secret" not in caplog.text


def test_one_thread_is_kept_for_foreground_misses(bench: Bench) -> None:
    bench.source.gate.clear()
    for extent in range(4, 40, 4):
        bench.entry.blob.prefetch(extent * EXTENT, 10, Priority.BULK)
    _await(lambda: len(bench.source.reads) == 2)
    prefetched = list(bench.source.reads)
    reader = threading.Thread(target=lambda: bench.entry.blob.read_at(0, 10))
    reader.start()
    _await(lambda: len(bench.source.reads) == 3)
    assert bench.source.reads[2] == (0, EXTENT)
    assert bench.source.reads[:2] == prefetched
    bench.source.gate.set()
    reader.join(WAIT)
    assert not reader.is_alive()


def test_a_host_that_stalls_leaves_threads_for_others(tmp_path: Path) -> None:
    engine = Engine(work_threads=1, readahead_extents=0)
    cache = Cache(tmp_path / "blobs", engine)
    pool = Pool(engine)
    pool.start()
    sources = [MemorySource(random.Random(name).randbytes(128 * EXTENT), name) for name in ("stuck", "well")]
    entries = []
    for source in sources:
        digest = f"sha256:{hashlib.sha256(source.content).hexdigest()}"
        entries.append(cache.open(digest, source.size, Policy("retry", WAIT)))
        pool.attach(entries[-1].id, entries[-1].blob, source)
    stuck, well = (entry.blob for entry in entries)
    sources[0].gate.clear()
    readers = [threading.Thread(target=stuck.read_at, args=(2 * extent * EXTENT, 10)) for extent in range(64)]
    try:
        for reader in readers:
            reader.start()
        _await(lambda: stuck.stat().misses == 64)
        assert well.read_at(100, 10) == sources[1].content[100:110]
        assert all(reader.is_alive() for reader in readers)
        assert len(sources[0].reads) <= pool_module.THREADS / 2
    finally:
        sources[0].gate.set()
        for reader in readers:
            reader.join(WAIT)
        engine.stop()
        assert pool.join(WAIT)
        for entry in entries:
            pool.detach(entry.id)
            entry.close()
        engine.close()
    assert sorted(sources[0].reads) == [(2 * extent * EXTENT, EXTENT) for extent in range(64)]


def test_a_failing_blob_is_news_once(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="blockdev.fetch.pool")
    bench.source.failures.extend(SourceError("read: memory: reset") for _ in range(4))
    bench.entry.blob.read_at(0, 10)
    _await(lambda: len(caplog.records) >= 2)  # the reader goes on before its fetch has ended
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "INFO"]
    assert bench.pool.failure(bench.entry.id) is None


def test_a_source_that_ends_with_its_blob_has_not_failed(bench: Bench) -> None:
    bench.source.gate.clear()
    bench.entry.blob.prefetch(0, 10, Priority.PREFETCH)
    _await(lambda: bench.source.reads)
    bench.pool.detach(bench.entry.id)
    bench.source.failures.append(SourceError("read: memory: it is being closed"))
    bench.source.gate.set()
    bench.engine.stop()
    assert bench.pool.join(WAIT)
    assert bench.pool._backoff.waiting(bench.source.host) == 0


def test_why_a_blob_fails_can_be_asked(bench: Bench) -> None:
    bench.source.failures.append(NotFound("read: memory: no such blob"))
    with pytest.raises(SourceError):
        bench.entry.blob.read_at(0, 10)
    assert str(bench.pool.failure(bench.entry.id)) == "read: memory: no such blob"


def test_a_fetch_that_ends_late_takes_no_later_failure_back(bench: Bench) -> None:
    whole, late = bench.source.read_into, threading.Event()

    def linger(offset, buffer, *, deadline, progress):  # type: ignore[no-untyped-def]
        bench.source.read_into = whole  # type: ignore[method-assign]
        whole(offset, buffer, deadline=deadline, progress=progress)
        late.wait(WAIT)

    bench.source.read_into = linger  # type: ignore[method-assign]
    assert bench.entry.blob.read_at(0, 10) == CONTENT[:10]
    bench.source.failures.append(NotFound("read: memory: no such blob"))
    with pytest.raises(SourceError):
        bench.entry.blob.read_at(EXTENT, 10)
    late.set()
    bench.engine.stop()
    assert bench.pool.join(WAIT)
    assert str(bench.pool.failure(bench.entry.id)) == "read: memory: no such blob"


def test_a_blob_that_is_down_is_probed_and_comes_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "PROBE_INTERVAL", 0.01)
    bench.entry.blob.set_policy(Policy("eio", 0.1))
    assert bench.entry.blob.read_at(0, 10) == CONTENT[:10]
    bench.source.well = False
    with pytest.raises(SourceError):
        bench.entry.blob.read_at(EXTENT, 10)
    bench.await_event(EventKind.BLOB_DOWN)
    bench.pool.blob_down(bench.entry.id)
    _await(lambda: bench.source.probes > 3)
    asked = len(bench.source.reads)
    with pytest.raises(SourceError):
        bench.entry.blob.read_at(EXTENT, 10)
    assert len(bench.source.reads) == asked  # nobody waits for a blob that is down
    assert bench.entry.blob.read_at(0, 10) == CONTENT[:10]
    bench.source.well = True
    _await(lambda: not bench.entry.blob.stat().down)
    assert bench.entry.blob.read_at(EXTENT, 10) == CONTENT[EXTENT : EXTENT + 10]


def test_a_blob_that_is_attached_anew_while_it_is_probed_comes_back(bench: Bench) -> None:
    probing, well = threading.Event(), threading.Event()

    def probe(deadline: float) -> None:
        probing.set()
        well.wait(WAIT)

    bench.entry.blob.set_policy(Policy("eio", 0.1))
    bench.source.well = False
    with pytest.raises(SourceError):
        bench.entry.blob.read_at(0, 10)
    bench.await_event(EventKind.BLOB_DOWN)
    bench.source.probe = probe  # type: ignore[method-assign]
    bench.pool.blob_down(bench.entry.id)
    assert probing.wait(WAIT)
    bench.pool.attach(bench.entry.id, bench.entry.blob, bench.source)  # as for each image that has the blob
    well.set()
    _await(lambda: not bench.entry.blob.stat().down)


def test_a_host_that_said_when_to_come_back_is_left_alone_until_then(bench: Bench) -> None:
    bench.source.failures.append(SourceError("read: memory: too many requests", retry_after=1.5))
    start = time.monotonic()
    assert bench.entry.blob.read_at(0, 10) == CONTENT[:10]
    assert time.monotonic() - start >= 1.5
    assert len(bench.source.reads) == 2


def test_bytes_that_another_read_has_spilled_are_not_asked_for_again(bench: Bench) -> None:
    def spill(offset, buffer, *, deadline, progress):  # type: ignore[no-untyped-def]
        bench.source.reads.append((offset, len(buffer)))
        bench.entry.blob.store(0, CONTENT)
        raise Spilled("read: memory: passed by")

    bench.source.read_into = spill  # type: ignore[method-assign]
    assert bench.entry.blob.read_at(100, 10) == CONTENT[100:110]
    assert len(bench.source.reads) == 1
    assert bench.entry.complete


def test_a_blob_without_a_source_fails_at_once(bench: Bench) -> None:
    bench.pool.detach(bench.entry.id)
    with pytest.raises(SourceError):
        bench.entry.blob.read_at(0, 10)


def test_stopping_ends_readers_and_idle_threads(bench: Bench) -> None:
    bench.source.gate.clear()
    ended: list[Exception] = []

    def read() -> None:
        try:
            bench.entry.blob.read_at(0, 10)
        except EngineStopped as error:
            ended.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    _await(lambda: bench.source.reads)
    bench.engine.stop()
    reader.join(WAIT)
    assert ended
    assert not bench.pool.join(0.1)  # one thread is still inside the source
    bench.source.gate.set()
    assert bench.pool.join(WAIT)


def test_threads_are_called_by_their_work(bench: Bench) -> None:
    names = {thread.name for thread in threading.enumerate()}
    assert {"fetch-0", "fetch-1", "fetch-2", "probe"} <= names


def test_a_fetch_thread_that_can_take_nothing_for_a_time_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pool_module, "_IDLE", 0.05)
    bench, free = Bench(tmp_path / "blobs"), threading.Event()

    def wait_in_the_place_of_one() -> None:
        while not free.wait(0.01):
            with contextlib.suppress(EngineError):
                bench.engine.next_fetch(Priority.BULK, timeout=0.5)

    others = [threading.Thread(target=wait_in_the_place_of_one) for _ in range(40)]  # 32 have room
    try:
        for other in others:
            other.start()
        _await(lambda: any("fetching stands still" in record.message for record in caplog.records))
    finally:
        free.set()
        for other in others:
            other.join(WAIT)
    assert bench.entry.blob.read_at(0, 10) == CONTENT[:10]
    assert all(thread.is_alive() for thread in bench.pool._threads)
    bench.close()
