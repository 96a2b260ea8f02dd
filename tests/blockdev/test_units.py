# SPDX-License-Identifier: Apache-2.0
"""A blob with a digest table: nothing of it is served, or enters the cache, that is not what the table says."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest

from blockdev import supply, units
from blockdev.errors import EngineError, SourceError
from blockdev.layer import SHA256, NamedBlob
from blockdev.source.blob import RegistryBlob
from formats.digests import UNIT, Table
from tests.checked import BLOB, DIGEST, END, PLACE, WAIT, Bench, await_written, same
from tests.commands import until
from tests.fakes.http_server import Answer, Seen


def test_the_table_comes_first_and_what_follows_comes_in_whole_units(bench: Bench, undo: ExitStack) -> None:
    named = bench.open(undo)
    assert (named.checked, named.doubtful) == (SHA256, False)
    assert not bench.liar.requests, "opening asks for nothing"
    for offset in (3 * UNIT + 77, 100, len(BLOB) - 10, 5 * UNIT - 5):
        assert same(named.blob.read_at(offset, 10), offset)
    first, *others = bench.liar.requests
    assert first == (END, len(BLOB) - 1), "with the unit that the covered bytes end in"
    assert all(start % UNIT == 0 and ((end + 1) % UNIT == 0 or end == len(BLOB) - 1) for start, end in others)
    assert named.blob.read_at(0, len(BLOB)) == BLOB
    asked = sum(end + 1 - start for start, end in bench.liar.requests)
    assert asked == len(BLOB), "nothing comes twice"
    assert bench.head().table == PLACE.digest


def test_a_unit_that_comes_wrong_is_asked_for_once_more(
    bench: Bench, undo: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    bench.liar.place, bench.liar.lies = 2 * UNIT + 5, 1
    assert same(bench.open(undo).blob.read_at(2 * UNIT, 100), 2 * UNIT)
    assert bench.liar.asked == 2
    assert f"{DIGEST}: offset {2 * UNIT}: extent of {UNIT} bytes is not what the image's manifest says" in caplog.text


@pytest.mark.parametrize("place", [2 * UNIT + 5, END + 3, END - 1, 0])
def test_a_unit_that_stays_wrong_is_an_error_and_nothing_of_it_is_kept(
    bench: Bench, undo: ExitStack, place: int
) -> None:
    bench.liar.place, bench.liar.lies = place, 1 << 30
    blob = bench.open(undo).blob
    unit = place // UNIT
    with pytest.raises(SourceError):
        blob.read_at(place, 1)
    why = bench.supply.why([NamedBlob(DIGEST, blob)])
    assert f"{DIGEST}: offset {unit * UNIT}" in str(why)
    asked = bench.liar.asked
    with pytest.raises(SourceError):
        blob.read_at(place, 1)
    assert bench.liar.asked == asked, "it is not asked for at each read"
    for other in range(10):
        if other != unit:
            assert same(blob.read_at(other * UNIT, 100), other * UNIT)
    assert not bench.cached() & set(range(4 * unit, 4 * unit + 4))


def test_what_comes_with_a_wrong_unit_is_not_lost(bench: Bench, undo: ExitStack) -> None:
    bench.liar.place, bench.liar.lies = 2 * UNIT + 5, 1 << 30
    blob = bench.open(undo).blob
    blob.read_at(len(BLOB) - 1, 1)
    with pytest.raises(SourceError):
        blob.read_at(0, 8 * UNIT)
    asked = len(bench.liar.requests)
    assert same(blob.read_at(0, 2 * UNIT), 0)
    assert same(blob.read_at(3 * UNIT, 5 * UNIT), 3 * UNIT)
    assert len(bench.liar.requests) == asked
    await_written(blob, 7 * UNIT + len(BLOB) - END)
    assert bench.cached() >= {*range(8), *range(12, 32)}


def test_whole_units_of_an_answer_that_broke_off_are_kept(bench: Bench, undo: ExitStack) -> None:
    blob = bench.open(undo).blob
    blob.read_at(len(BLOB) - 1, 1)
    bench.liar.requests.clear()
    bench.liar.cut = 2 * UNIT + 100
    assert same(blob.read_at(0, 5 * UNIT), 0)
    assert bench.liar.requests == [(0, 5 * UNIT - 1), (2 * UNIT, 5 * UNIT - 1)]


def test_it_is_right_again_when_it_comes_right(
    bench: Bench, undo: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "REFUSED_DELAY", 0.0)
    bench.liar.place, bench.liar.lies = UNIT, 2
    blob = bench.open(undo).blob
    with pytest.raises(SourceError):
        blob.read_at(UNIT, 1)
    assert same(blob.read_at(UNIT, 1000), UNIT)


def test_a_table_that_comes_wrong_once_is_asked_for_once_more(bench: Bench, undo: ExitStack) -> None:
    bench.liar.place, bench.liar.lies = PLACE.offset + 70, 1
    assert same(bench.open(undo).blob.read_at(5, 100), 5)
    assert bench.liar.requests[:2] == [(END, len(BLOB) - 1)] * 2


def test_a_table_that_stays_wrong_makes_all_of_it_unreadable(bench: Bench, undo: ExitStack) -> None:
    bench.liar.place, bench.liar.lies = PLACE.offset + 70, 1 << 30
    blob = bench.open(undo).blob
    for offset in (0, UNIT, len(BLOB) - 1):
        with pytest.raises(SourceError):
            blob.read_at(offset, 1)
    assert bench.liar.asked == 2
    assert f"{DIGEST}: offset {PLACE.offset}" in str(bench.supply.why([NamedBlob(DIGEST, blob)]))
    assert not bench.cached()


def test_many_readers_at_once_get_what_is_right(bench: Bench, undo: ExitStack) -> None:
    bench.liar.place, bench.liar.lies = 7 * UNIT + 1, 1
    blob = bench.open(undo).blob
    wrong: list[int] = []

    def reader(seed: int) -> None:
        places = random.Random(seed)
        for _ in range(40):
            offset = places.randrange(len(BLOB) - 50_000)
            if not same(blob.read_at(offset, 50_000), offset):
                wrong.append(offset)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive()
    assert not wrong
    bench.cached()


@pytest.mark.parametrize("lies", [0, 1, 1 << 30])
def test_a_registry_that_ignores_ranges_is_checked_too(
    bench: Bench, undo: ExitStack, lies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockdev.source.blob.WHOLE_PAUSE", 0.0)
    bench.liar.ranges = False
    bench.liar.place, bench.liar.lies = 3 * UNIT + 9, lies
    blob = bench.open(undo).blob
    assert same(blob.read_at(8 * UNIT, 1000), 8 * UNIT)
    if lies == 1 << 30:
        with pytest.raises(SourceError):
            blob.read_at(3 * UNIT, 1000)
        assert not bench.cached() & {12, 13, 14, 15}
    else:
        assert same(blob.read_at(3 * UNIT, 1000), 3 * UNIT)
    assert same(blob.read_at(0, UNIT), 0)


def test_a_table_that_another_reads_stream_has_brought_is_taken(bench: Bench, undo: ExitStack) -> None:
    gate, looked = threading.Event(), threading.Event()
    answer = bench.liar.server.answer

    def hold(seen: Seen) -> Answer:
        return replace(answer(seen), gate=gate, hold_at=UNIT)

    def here(offset: int, length: int) -> bytes:
        with bench.data.open("rb") as file:
            found = os.pread(file.fileno(), length, offset)
        looked.set()
        return found

    def read() -> None:
        origin.read_into(0, memoryview(bytearray(10)), deadline=deadline, progress=lambda filled: None)

    bench.liar.ranges, bench.liar.server.answer = False, hold
    blob = bench.open(undo).blob
    origin = RegistryBlob(bench.client, "app", DIGEST, len(BLOB), blob.store)
    deadline = time.monotonic() + WAIT
    found: list[Table] = []
    other = units.Units(DIGEST, PLACE, blob.offer, here, bench.blobs)
    reader = threading.Thread(target=read)
    loader = threading.Thread(target=lambda: found.append(other.load(origin, deadline)))
    reader.start()
    assert until(lambda: bool(bench.liar.requests))
    loader.start()
    assert looked.wait(WAIT)
    gate.set()
    reader.join(WAIT)
    loader.join(WAIT)
    assert [table.place for table in found] == [PLACE]
    assert len(bench.liar.requests) == 1


def test_what_all_tables_have_is_bounded(bench: Bench, undo: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supply, "TABLES_MAX", PLACE.length)
    with ExitStack() as first:
        bench.open(first)
        bench.open(undo)  # has the same
    undo.close()
    monkeypatch.setattr(supply, "TABLES_MAX", PLACE.length - 1)
    with pytest.raises(EngineError, match="digest tables"):
        bench.open(undo)
    assert not bench.cache.stat()
    monkeypatch.setattr(supply, "TABLES_MAX", PLACE.length)
    assert same(bench.open(undo).blob.read_at(0, 10), 0)


def test_a_registry_that_ignores_ranges_sends_the_blob_once(
    bench: Bench, undo: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    """The first whole body brings the table, and all that waited for it."""
    bench.liar.ranges = False
    blob = bench.open(undo).blob
    assert blob.read_at(0, len(BLOB)) == BLOB
    assert len(bench.liar.requests) == 1
    assert caplog.text.count("ignores ranges") == 1


def test_where_a_whole_body_has_no_room_it_comes_again(
    bench: Bench, undo: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("blockdev.early.write_at", full)
    monkeypatch.setattr("blockdev.source.blob.WHOLE_PAUSE", 0.0)
    bench.liar.ranges = False
    blob = bench.open(undo).blob
    assert blob.read_at(0, len(BLOB)) == BLOB
    assert len(bench.liar.requests) == 2
