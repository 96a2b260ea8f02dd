# SPDX-License-Identifier: Apache-2.0
"""One digest, named by images of several repositories, of which not all have the blob that it stands for."""

from __future__ import annotations

import os
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blockdev import entryfiles
from blockdev.catalog import Catalog
from blockdev.catalog import Place as Repository
from blockdev.config import Policy
from blockdev.engine import EXTENT_SIZE, Priority
from blockdev.errors import BlockdevError, CorruptImage, EngineError, SourceError
from blockdev.origin import Part
from blockdev.remote import Remotes
from formats import presence
from formats.digests import UNIT, Place
from tests.checked import await_written
from tests.claimants import DIGEST, EVIL_PAYLOAD, EVIL_TABLE, GOOD, HERE, SIZE, TABLE, THERE, WAIT, Bench
from tests.fakes.blob_server import REPOSITORY, BlobServer
from tests.fakes.memory_source import MemorySource
from tests.filling import WAITING, flip
from tests.small_image import NOBODY


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


# ---- on whose word ----------------------------------------------------------------------------------


@pytest.mark.parametrize("evil_table", [None, EVIL_TABLE])
@pytest.mark.parametrize("table", [None, TABLE])
def test_open_together_each_has_its_own(
    bench: Bench, undo: ExitStack, table: Place | None, evil_table: Place | None
) -> None:
    good = bench.open(undo, bench.good, table).blob
    evil = bench.open(undo, bench.evil, evil_table).blob
    assert good.read_at(0, SIZE) == GOOD
    assert evil.read_at(0, SIZE) == EVIL_PAYLOAD
    assert good.read_at(0, SIZE) == GOOD
    again = bench.open(undo, bench.good, table).blob
    assert again is good


@pytest.mark.parametrize("evil_table", [None, EVIL_TABLE])
@pytest.mark.parametrize("table", [None, TABLE])
def test_who_comes_second_has_its_own(
    bench: Bench, undo: ExitStack, table: Place | None, evil_table: Place | None
) -> None:
    evil = bench.open(undo, bench.evil, evil_table).blob
    assert evil.read_at(0, SIZE) == EVIL_PAYLOAD
    good = bench.open(undo, bench.good, table).blob
    assert good.read_at(0, SIZE) == GOOD
    assert bench.open(undo, bench.good, table).blob is good


@pytest.mark.parametrize("evil_table", [None, EVIL_TABLE])
@pytest.mark.parametrize("table", [None, TABLE])
def test_what_another_left_is_not_read(bench: Bench, table: Place | None, evil_table: Place | None) -> None:
    assert bench.read(bench.evil, evil_table, 2 * EXTENT_SIZE) == EVIL_PAYLOAD[: 2 * EXTENT_SIZE]
    assert bench.read(bench.good, table) == GOOD


def test_a_map_that_does_not_say_whose_it_is_is_not_believed(bench: Bench) -> None:
    bench.read(bench.evil, None, 2 * EXTENT_SIZE)
    old = presence.Head(DIGEST, SIZE, verified=False).build()
    with open(entryfiles.map_of(bench.data), "r+b") as file:
        file.write(old)
    assert bench.read(bench.good) == GOOD


def test_one_repositorys_own_stays_over_a_restart(bench: Bench) -> None:
    bench.fill(0, 3)
    bench.close()
    bench.start()
    assert bench.read(bench.good) == GOOD
    assert sum(length for _, length in bench.good.reads) == SIZE - 2 * EXTENT_SIZE


def test_without_tls_it_is_another(bench: Bench, undo: ExitStack) -> None:
    bench.open(undo, bench.evil, of=Repository(HERE.registry, HERE.repository, plain_http=True)).blob.read_at(0, 9)
    assert bench.open(undo, bench.good).blob.read_at(0, 9) == GOOD[:9]


def test_one_table_is_shared_whoever_delivers(bench: Bench, undo: ExitStack) -> None:
    blob = bench.open(undo, bench.good, TABLE).blob
    assert bench.open(undo, bench.evil, TABLE).blob is blob
    assert blob.read_at(0, SIZE) == GOOD


def test_what_is_verified_is_shared(bench: Bench, undo: ExitStack, tmp_path: Path) -> None:
    bench.adopt(tmp_path)
    blobs = {bench.open(undo, source).blob for source in (bench.good, bench.evil)}
    assert len(blobs) == 1
    assert blobs.pop().read_at(0, SIZE) == GOOD
    assert bench.good.reads == bench.evil.reads == []


def test_what_rots_under_two_comes_back_if_both_say_the_same(bench: Bench, undo: ExitStack, tmp_path: Path) -> None:
    bench.adopt(tmp_path)
    good = bench.open(undo, bench.good).blob
    with ExitStack() as second:
        evil = bench.open(second, bench.evil, policy=Policy("eio", 0.1)).blob
        assert evil is good
        assert good.drop(EXTENT_SIZE, EXTENT_SIZE) == 1
        bench.evil.content = GOOD
        assert good.read_at(EXTENT_SIZE, 10) == GOOD[EXTENT_SIZE:][:10]
        assert len(bench.evil.reads) == len(bench.good.reads) == 1
    await_written(good, SIZE)
    assert bench.head().repository in (HERE.key, THERE.key)
    assert good.drop(EXTENT_SIZE, EXTENT_SIZE) == 1
    assert good.read_at(EXTENT_SIZE, 10) == GOOD[EXTENT_SIZE:][:10]
    assert bench.head().repository == HERE.key
    assert len(bench.evil.reads) == 1


def test_what_rots_under_two_who_differ_is_nobodys(bench: Bench, undo: ExitStack, tmp_path: Path) -> None:
    bench.adopt(tmp_path)
    good = bench.open(undo, bench.good).blob
    with ExitStack() as second:
        bench.open(second, bench.evil)
        assert good.drop(EXTENT_SIZE, EXTENT_SIZE) == 1
        good.prefetch(EXTENT_SIZE, EXTENT_SIZE, Priority.PREFETCH)
        while len(bench.evil.reads) < 1:
            os.sched_yield()
        assert good.stat().present_bytes == SIZE - EXTENT_SIZE
    assert good.read_at(EXTENT_SIZE, EXTENT_SIZE) == GOOD[EXTENT_SIZE : 2 * EXTENT_SIZE]


def test_what_one_table_alone_vouches_for_is_not_kept_for_others(bench: Bench, undo: ExitStack, tmp_path: Path) -> None:
    bench.adopt(tmp_path)
    good = bench.open(undo, bench.good, policy=Policy("eio", 0.1)).blob
    with ExitStack() as second:
        bench.open(second, bench.evil, EVIL_TABLE, policy=Policy("eio", 0.1))
        assert good.drop(0, SIZE) == -(-SIZE // EXTENT_SIZE)
        with pytest.raises(SourceError):
            good.read_at(0, SIZE)
    good.settle()
    good.healthy()
    assert good.read_at(0, SIZE) == GOOD


def test_who_has_a_table_takes_what_rots_by_it_whoever_opened_the_blob(
    bench: Bench, undo: ExitStack, tmp_path: Path
) -> None:
    bench.adopt(tmp_path)
    with ExitStack() as first:
        plain = bench.open(first, bench.good).blob
        named = bench.open(undo, bench.evil, TABLE)
        assert named.blob is plain
    assert named.units
    assert named.blob.drop(EXTENT_SIZE, EXTENT_SIZE) == 1
    with pytest.raises(SourceError):
        named.blob.read_at(EXTENT_SIZE, 10)
    assert named.units.mismatches == 2
    bench.evil.content = GOOD
    assert named.blob.drop(UNIT, EXTENT_SIZE) == 1
    assert named.blob.read_at(UNIT, 10) == GOOD[UNIT:][:10]
    await_written(named.blob, SIZE - EXTENT_SIZE)
    assert bench.head().table == TABLE.digest


def test_each_of_two_tables_is_asked_for_what_rots(bench: Bench, undo: ExitStack, tmp_path: Path) -> None:
    bench.adopt(tmp_path)
    with ExitStack() as first:
        bench.open(first, bench.good, TABLE)
        named = bench.open(undo, bench.evil, EVIL_TABLE)
    assert named.blob.drop(EXTENT_SIZE, EXTENT_SIZE) == 1
    bench.evil.content = GOOD
    with pytest.raises(SourceError):
        named.blob.read_at(EXTENT_SIZE, 10)
    assert bench.open(undo, bench.good, TABLE).blob.read_at(EXTENT_SIZE, 10) == GOOD[EXTENT_SIZE:][:10]


# ---- sizes ------------------------------------------------------------------------------------------


def test_another_size_costs_nobody_what_is_here(bench: Bench, undo: ExitStack) -> None:
    bench.fill(0, 3)
    bench.open(undo, bench.evil, size=SIZE + 1)
    good = bench.open(undo, bench.good).blob
    assert good.read_at(0, EXTENT_SIZE) == GOOD[:EXTENT_SIZE]
    assert bench.good.reads == []


def test_another_size_that_is_open_makes_nobody_corrupt(bench: Bench, undo: ExitStack, tmp_path: Path) -> None:
    with ExitStack() as first:
        bench.open(first, bench.evil, size=SIZE - 1).blob.read_at(0, 10)
        assert bench.open(undo, bench.good).blob.read_at(0, SIZE) == GOOD
        bench.adopt(tmp_path)
        assert bench.head().verified
    assert bench.open(undo, bench.good).blob.read_at(0, SIZE) == GOOD
    with pytest.raises(CorruptImage, match=str(SIZE)):
        bench.open(undo, bench.evil, size=SIZE - 1)


def test_the_size_that_another_has_said_is_not_taken(bench: Bench) -> None:
    bench.fill(0)
    assert bench.cache.size_of(DIGEST, HERE.key) == SIZE
    assert bench.cache.size_of(DIGEST, THERE.key) is None


# ---- what is whole ------------------------------------------------------------------------------------


def test_what_is_verified_apart_is_kept(bench: Bench, undo: ExitStack) -> None:
    evil = bench.open(undo, bench.evil).blob
    with ExitStack() as mounted:
        good = bench.open(mounted, bench.good).blob
        entry = bench.cache.in_use(good)
        assert entry
        mounted.callback(entry.close)
        entry.verify()
        assert bench.data.read_bytes() == GOOD
        assert [one.verified for one in bench.cache.stat()] == [True]
        assert bench.cache.verified(good)
        assert not bench.cache.verified(evil)
    assert evil.read_at(0, SIZE) == EVIL_PAYLOAD
    assert bench.open(undo, bench.evil, size=SIZE).blob.read_at(0, SIZE) == GOOD


def test_a_file_that_is_added_replaces_what_another_has_brought(bench: Bench, undo: ExitStack, tmp_path: Path) -> None:
    evil = bench.open(undo, bench.evil).blob
    evil.read_at(0, SIZE)
    await_written(evil, SIZE)
    bench.adopt(tmp_path)
    assert evil.read_at(0, SIZE) == GOOD
    assert bench.head().verified


@pytest.mark.parametrize("table", [None, TABLE])
def test_who_opens_a_blob_does_not_wait_until_it_is_verified(
    bench: Bench, undo: ExitStack, table: Place | None
) -> None:
    blob = bench.open(undo, bench.good, table).blob
    entry = bench.cache.in_use(blob)
    assert entry
    undo.callback(entry.close)
    begun, opened = threading.Event(), threading.Event()
    in_time = []

    def reach(_end: int) -> None:
        begun.set()
        in_time.append(opened.wait(WAIT))

    verifying = threading.Thread(target=entry.verify, args=(reach,))
    verifying.start()
    assert begun.wait(WAIT)
    assert bench.open(undo, bench.good, table).blob is blob
    opened.set()
    verifying.join()
    assert in_time == [True]
    assert entry.verified


def test_pruning_leaves_what_is_apart_to_its_user(bench: Bench, undo: ExitStack) -> None:
    with ExitStack() as first:
        bench.open(first, bench.evil).blob.read_at(0, 10)
        good = bench.open(undo, bench.good).blob
        assert good.read_at(0, SIZE) == GOOD
    assert bench.cache.prune().removed == (DIGEST,)
    assert good.read_at(0, SIZE) == GOOD
    assert list(bench.blobs.rglob("*/*")) == []


@pytest.mark.parametrize("added", [False, True])
def test_names_that_cannot_be_taken_stay_with_who_has_them(
    bench: Bench, undo: ExitStack, tmp_path: Path, *, added: bool
) -> None:
    size = SIZE - 1 if added else SIZE
    evil = bench.open(undo, bench.evil, size=size).blob
    assert evil.read_at(0, 10) == EVIL_PAYLOAD[:10]
    entry = bench.cache.in_use(bench.open(undo, bench.good).blob)
    assert entry
    undo.callback(entry.close)
    map_file = entryfiles.map_of(bench.data)
    map_file.unlink()
    map_file.mkdir()  # which no unlink takes away
    with pytest.raises(BlockdevError):
        bench.adopt(tmp_path) if added else entry.verify()
    map_file.rmdir()
    assert bench.open(undo, bench.evil, size=size).blob is evil
    assert evil.read_at(0, size) == EVIL_PAYLOAD[:size]


def test_files_get_both_names_or_none(bench: Bench) -> None:
    folder = bench.data.parent
    folder.mkdir(parents=True)
    with tempfile.TemporaryFile(dir=folder) as unnamed, open(folder / "gone", "w+b") as gone:
        (folder / "gone").unlink()  # which no link brings back
        with pytest.raises(FileNotFoundError):
            entryfiles.name_files(bench.data, unnamed.fileno(), gone.fileno())
    assert list(folder.iterdir()) == []


# ---- repair -------------------------------------------------------------------------------------------


def test_a_repair_asks_only_where_it_came_from(bench: Bench) -> None:
    bench.catalog.note_place(THERE, [DIGEST])
    bench.fill(0, 3)
    flip(bench.data, 5)
    (one,) = bench.repair({HERE: bench.good, THERE: bench.evil})
    assert one.state == "repaired"
    assert bench.evil.reads == []
    assert bench.read(bench.good, None, EXTENT_SIZE) == GOOD[:EXTENT_SIZE]


def test_where_that_is_not_known_nothing_is_asked(bench: Bench, tmp_path: Path) -> None:
    bench.fill(0, 3)
    bench.catalog = Catalog(tmp_path / "other")
    bench.catalog.note_place(THERE, [DIGEST])
    flip(bench.data, 5)
    (one,) = bench.repair({THERE: bench.evil})
    assert (one.state, one.kind) == ("dropped", "NotFound")
    assert bench.evil.reads == []


def test_what_was_verified_is_repaired_from_anywhere_and_then_from_there(bench: Bench, tmp_path: Path) -> None:
    bench.adopt(tmp_path)
    bench.catalog.note_place(THERE, [DIGEST])
    flip(bench.data, 5)
    bench.evil.well = False
    (one,) = bench.repair({THERE: bench.evil})
    assert one.state == "dropped"
    assert bench.head().repository == THERE.key
    bench.evil.well = True
    assert bench.read(bench.good) == GOOD


def test_what_has_become_whole_since_it_was_looked_at_is_not_removed(bench: Bench, tmp_path: Path) -> None:
    bench.adopt(tmp_path)
    os.truncate(entryfiles.map_of(bench.data), 9)
    (one,) = bench.repair({}, meanwhile=lambda: bench.adopt(tmp_path))
    assert one.state == "repaired"
    assert bench.head().verified
    assert bench.data.read_bytes() == GOOD


def test_an_entry_that_no_descriptor_is_left_for_is_not_taken_for_damaged(bench: Bench, tmp_path: Path) -> None:
    bench.adopt(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_free = os.dup(0)
    os.close(next_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_free, hard))
    try:
        with pytest.raises(EngineError, match="Too many open files"):
            bench.cache.look(DIGEST)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert bench.cache.look(DIGEST).verified


def test_what_is_stored_is_under_the_name_of_where_it_came_from(bench: Bench, undo: ExitStack) -> None:
    with ExitStack() as first:
        entry = bench.cache.in_use(bench.open(first, bench.good).blob)
        assert entry
        first.callback(entry.close)
        entry.verify()
    flip(bench.data, 5)
    flip(bench.data, 2 * EXTENT_SIZE)
    bench.supply.backoff.told(bench.evil.host, WAIT)
    blob = bench.open(undo, bench.evil, policy=Policy("eio", 0.1)).blob
    with pytest.raises(SourceError):
        blob.read_at(0, 10)  # which breaks the seal, and asks nobody yet
    assert bench.head().repository == HERE.key
    (one,) = bench.repair({THERE: MemorySource(GOOD, "third")})
    assert (one.state, one.offset) == ("repaired", 2 * EXTENT_SIZE)
    assert bench.head().repository == THERE.key


def test_nothing_says_that_a_table_was_asked_before_it_was(bench: Bench, undo: ExitStack) -> None:
    bench.fill(0, 3)
    entry = bench.cache.open(DIGEST, SIZE, Policy("eio", WAIT), TABLE, HERE.key)
    undo.callback(entry.close)
    entry.claim([entry.word])
    assert (bench.head().table, bench.head().repository) == ("", "")
    entry.trust(lambda units: units.load(bench.good, time.monotonic() + WAIT))
    assert (bench.head().table, bench.head().repository) == (TABLE.digest, HERE.key)


# ---- as images name it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [False, True])
def test_a_part_of_an_image_has_the_word_of_its_own_url(bench: Bench, undo: ExitStack, *, together: bool) -> None:
    remotes = Remotes(bench.supply, bench.cache, bench.catalog)
    access = {"plain_http": False, "ca": "", "credentials": NOBODY.to_json()}

    def read(server: BlobServer) -> bytes:
        part = Part(DIGEST, SIZE, DIGEST, f"http://{server.host}/v2/{REPOSITORY}/blobs/{DIGEST}")
        with ExitStack() as reading:
            blob = remotes.open_part(part, access, Policy("eio", WAIT), undo if together else reading, WAITING).blob
            return blob.read_at(0, EXTENT_SIZE)

    with BlobServer(GOOD) as good, BlobServer(GOOD) as evil:
        evil.content = EVIL_PAYLOAD
        assert read(evil) == EVIL_PAYLOAD[:EXTENT_SIZE]
        assert read(good) == GOOD[:EXTENT_SIZE]
        undo.close()
