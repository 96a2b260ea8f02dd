# SPDX-License-Identifier: Apache-2.0
"""A blob with a digest table: nothing of it is served, or enters the cache, that is not what the table says."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blockdev import entryfiles, units
from blockdev.cache import Cache
from blockdev.config import Policy
from blockdev.engine import EXTENT_SIZE, Blob, Engine, Priority
from blockdev.errors import CorruptImage, DeviceError, SourceError
from blockdev.fetch.pull import Pull
from blockdev.layer import CRC_ONLY, SHA256, NamedBlob
from blockdev.registry.client import Client
from blockdev.source.blob import RegistryBlob
from blockdev.supply import Supply
from formats import oci, presence
from formats.digests import UNIT, Place
from tests.fakes.http_server import Answer, HttpServer, Seen, ranged
from tests.small_image import NOBODY
from tests.tabled import tabled

WAIT = 20.0
BLOB, PLACE = tabled(random.Random(11).randbytes(9 * UNIT + 70_000))
DIGEST = oci.digest_of(BLOB)
END = PLACE.covered // UNIT * UNIT  # of the whole units


class Liar:
    """Serves a blob; the byte at `place` is wrong the next `lies` times that it is asked for."""

    def __init__(self) -> None:
        self.place = self.lies = self.asked = 0
        self.ranges = True
        self.cut: int | None = None  # of the next answer, where it breaks off
        self.requests: list[tuple[int, int]] = []  # first and last byte
        self.server = HttpServer(self._answer)

    def _answer(self, seen: Seen) -> Answer:
        assert seen.range
        if seen.range[0] != seen.range[1]:  # a probe asks for one byte
            self.requests.append(seen.range)
        answer = ranged(seen, BLOB) if self.ranges else Answer(200, {}, BLOB)
        answer.cut, self.cut = self.cut, None
        at = self.place - (seen.range[0] if self.ranges else 0)
        if 0 <= at < len(answer.body):
            self.asked += 1
            if self.lies:
                self.lies -= 1
                answer.body = altered(answer.body, at)
        return answer


def altered(content: bytes, at: int) -> bytes:
    wrong = bytearray(content)
    wrong[at] ^= 0x40
    return bytes(wrong)


class Bench:
    """An owner's engine, cache and supply, and a blob of a liar's."""

    def __init__(self, folder: Path, liar: Liar) -> None:
        self.blobs = folder
        self.liar = liar
        self.engine = Engine(work_threads=1, readahead_extents=32)
        self.cache = Cache(folder, self.engine)
        self.supply = Supply(self.engine, self.cache)
        self.client = Client(liar.server.host, NOBODY)

    def open(self, undo: ExitStack, place: Place | None = PLACE) -> NamedBlob:
        return self.supply.open(
            DIGEST,
            len(BLOB),
            Policy("eio", WAIT),
            lambda into, undo: RegistryBlob(self.client, "app", DIGEST, len(BLOB), into.store),
            undo,
            place,
        )

    def head(self) -> presence.Head:
        """What the disk says."""
        path = entryfiles.map_of(entryfiles.path_of(self.blobs, DIGEST))
        return presence.Head.parse(path.read_bytes()[: presence.HEAD_SIZE])

    def cached(self) -> set[int]:
        """The extents of the cache's files; none is other than the blob's."""
        path = entryfiles.path_of(self.blobs, DIGEST)
        with open(entryfiles.map_of(path), "rb") as file:
            table = entryfiles.read_table(file.fileno(), len(BLOB))
        here = {extent for extent, entry in enumerate(table) if entry}
        content = path.read_bytes()
        for extent in here:
            part = slice(extent * EXTENT_SIZE, (extent + 1) * EXTENT_SIZE)
            assert content[part] == BLOB[part], f"extent {extent}"
        return here

    def close(self) -> None:
        self.engine.stop()
        assert self.supply.join(WAIT)
        self.engine.close()
        self.client.close()


@pytest.fixture
def liar() -> Iterator[Liar]:
    made = Liar()
    yield made
    made.server.close()


@pytest.fixture
def bench(tmp_path: Path, liar: Liar) -> Iterator[Bench]:
    made = Bench(tmp_path, liar)
    yield made
    made.close()


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def same(found: bytes | bytearray, offset: int) -> bool:
    return found == BLOB[offset : offset + len(found)]


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
    corrupt = bench.supply.corrupt([NamedBlob(DIGEST, blob)])
    assert f"{DIGEST}: offset {unit * UNIT}" in str(corrupt)
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
    assert f"{DIGEST}: offset {PLACE.offset}" in str(bench.supply.corrupt([NamedBlob(DIGEST, blob)]))
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
    """The first whole body brings the table, and everything once that is known."""
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


# ---- what was there before ------------------------------------------------------------------------


def await_written(blob: Blob, size: int) -> None:
    """What has been read may be on its way to the disk still."""
    deadline = time.monotonic() + WAIT
    while blob.stat().present_bytes < size:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def fill_unchecked(bench: Bench, *reads: tuple[int, int]) -> None:
    """What a reader without the table leaves; the byte at 2 * UNIT + 5 was wrong."""
    bench.liar.place, bench.liar.lies = 2 * UNIT + 5, 1
    with ExitStack() as undo:
        named = bench.open(undo, None)
        assert (named.checked, named.doubtful) == (CRC_ONLY, True)
        for offset, length in reads:
            named.blob.read_at(offset, length)
        await_written(named.blob, sum(length for _, length in reads))
    bench.liar.lies = 0
    assert bench.head().table == ""


def test_what_came_unchecked_is_hashed_at_its_first_use(
    bench: Bench, undo: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="blockdev.openentry")
    fill_unchecked(bench, (UNIT, 2 * UNIT), (5 * UNIT, EXTENT_SIZE))
    named = bench.open(undo)
    assert named.checked == SHA256
    assert bench.cached() == {4, 5, 6, 7, *range(4 * END // UNIT, -(-len(BLOB) // EXTENT_SIZE))}
    assert bench.head().table == PLACE.digest
    assert "dropped=2" in caplog.text
    assert same(named.blob.read_at(2 * UNIT, UNIT), 2 * UNIT)
    await_written(named.blob, 2 * UNIT + len(BLOB) - END)
    undo.close()
    caplog.clear()
    bench.liar.server.close()
    named = bench.open(undo)
    assert same(named.blob.read_at(UNIT, 2 * UNIT), UNIT)
    assert "checked against its digest table" not in caplog.text, "the flag stays over a restart"


def test_nothing_is_served_unchecked_when_the_table_cannot_be_had(tmp_path: Path, liar: Liar, undo: ExitStack) -> None:
    bench = Bench(tmp_path, liar)
    undo.callback(bench.close)
    fill_unchecked(bench, (0, 3 * UNIT))
    liar.server.close()
    with ExitStack() as opening, pytest.raises(SourceError):
        bench.supply.open(
            DIGEST,
            len(BLOB),
            Policy("eio", 0.2),
            lambda into, undo: RegistryBlob(bench.client, "app", DIGEST, len(BLOB), into.store),
            opening,
            PLACE,
        )
    assert bench.head().table == ""


def test_the_table_that_is_here_is_used_without_the_registry(bench: Bench, undo: ExitStack) -> None:
    fill_unchecked(bench, (0, len(BLOB)))
    bench.liar.server.close()
    named = bench.open(undo)
    assert same(named.blob.read_at(3 * UNIT, 2 * UNIT), 3 * UNIT)
    assert set(range(-(-len(BLOB) // EXTENT_SIZE))) - {8, 9, 10, 11} == bench.cached()


def test_whoever_opens_it_without_the_table_takes_the_flag_away(bench: Bench, undo: ExitStack) -> None:
    with ExitStack() as first:
        bench.open(first).blob.read_at(0, 1)
    assert bench.head().table == PLACE.digest
    with ExitStack() as second:
        assert bench.open(second, None).checked == CRC_ONLY
    assert bench.head().table == ""


def test_beside_one_who_checks_all_is_checked(bench: Bench, undo: ExitStack) -> None:
    bench.open(undo)
    bench.liar.place, bench.liar.lies = UNIT, 1
    named = bench.open(undo, None)
    assert named.checked == SHA256
    assert same(named.blob.read_at(UNIT, 10), UNIT)
    assert bench.liar.asked == 2


def test_what_is_in_use_unchecked_is_not_taken_over(bench: Bench, undo: ExitStack) -> None:
    bench.open(undo, None)
    with pytest.raises(DeviceError, match="in use by who does not check it"):
        bench.open(undo)


def test_two_tables_for_one_blob_cannot_both_be_right(bench: Bench, undo: ExitStack) -> None:
    bench.open(undo)
    with pytest.raises(CorruptImage, match="different digest tables"):
        bench.open(undo, Place(PLACE.covered, f"sha256:{'0' * 64}"))


def test_a_blob_whose_whole_digest_was_right_needs_no_look(bench: Bench, undo: ExitStack, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(BLOB)
    with open(tmp_path / "file", "rb") as file:
        bench.cache.adopt(file.fileno(), DIGEST)
    bench.liar.server.close()
    named = bench.open(undo)
    assert bench.head().table == PLACE.digest
    assert bench.head().verified
    assert same(named.blob.read_at(0, len(BLOB)), 0)
    assert bench.cache.verified(DIGEST)


def test_a_part_that_rots_is_fetched_with_its_unit_and_checked(bench: Bench, undo: ExitStack) -> None:
    blob = bench.open(undo).blob
    blob.read_at(0, len(BLOB))
    assert blob.drop(5 * EXTENT_SIZE, EXTENT_SIZE) == 1
    bench.liar.requests.clear()
    bench.liar.place, bench.liar.lies = 7 * EXTENT_SIZE, 1
    assert same(blob.read_at(5 * EXTENT_SIZE, 100), 5 * EXTENT_SIZE)
    assert bench.liar.requests == [(UNIT, 2 * UNIT - 1)] * 2


# ---- bulk -------------------------------------------------------------------------------------------


def pull(bench: Bench) -> None:
    entry = bench.cache.in_use(DIGEST)
    assert entry
    try:
        Pull("image", [entry], bench.supply, Policy("eio", WAIT)).complete(lambda *_: None, threading.Event())
        assert entry.verified
    finally:
        entry.close()


@pytest.mark.parametrize("lies", [0, 1])
def test_a_full_pull_is_checked_on_its_way(bench: Bench, undo: ExitStack, lies: int) -> None:
    bench.liar.place, bench.liar.lies = 4 * UNIT + 9, lies
    bench.open(undo)
    pull(bench)
    assert len(bench.cached()) == -(-len(BLOB) // EXTENT_SIZE)
    assert bench.head().verified


def test_a_full_pull_of_what_stays_wrong_says_which_part(bench: Bench, undo: ExitStack) -> None:
    bench.liar.place, bench.liar.lies = 4 * UNIT + 9, 1 << 30
    blob = bench.open(undo).blob
    with pytest.raises(CorruptImage, match=f"{DIGEST}: offset {4 * UNIT}"):
        pull(bench)
    blob.prefetch(0, UNIT, Priority.BULK)
    assert not bench.cached() & {16, 17, 18, 19}
