# SPDX-License-Identifier: Apache-2.0
"""A flipped bit is found wherever it is and never served; what only changes is not called bad."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import entryfiles
from blockdev.scan import Bad, scan
from formats import presence
from tests.filling import CONTENT, DIGEST, EXTENT, Filling, flip
from tests.requires import scaled

FLIPS = scaled(60, 5000)
CHANGES = scaled(200, 5000)


@pytest.fixture
def filling(tmp_path: Path) -> Iterator[Filling]:
    filling = Filling(tmp_path)
    yield filling
    filling.close()


@pytest.fixture
def path(filling: Filling) -> Path:
    """The data file of an entry that is whole, and that nobody has open."""
    entry = filling.open()
    entry.blob.store(0, CONTENT)
    entry.close()
    return entryfiles.path_of(filling.blobs, DIGEST)


def _scan(filling: Filling, *, hashed: bool = False) -> list[Bad]:
    looked: list[int] = []
    found = entryfiles.look(filling.blobs, DIGEST)
    bad = scan(filling.blobs, found, looked.append, hashed=hashed)
    assert sum(looked) == found.present
    return bad


def test_what_is_right_is_not_bad(filling: Filling, path: Path) -> None:
    assert _scan(filling, hashed=True) == []


def test_a_bit_flipped_anywhere_is_found_and_not_served(filling: Filling, path: Path) -> None:
    rng = random.Random(7)
    places = [0, len(CONTENT) - 1, *(rng.randrange(len(CONTENT)) for _ in range(FLIPS - 2))]
    for place in places:
        flip(path, place, 1 << rng.randrange(8))
        (bad,) = _scan(filling)
        assert bad.offset == place // EXTENT * EXTENT
        assert bad.length == min(EXTENT, len(CONTENT) - bad.offset)
        filling.source.reads.clear()
        entry = filling.open()
        assert entry.blob.read_at(0, len(CONTENT)) == CONTENT
        assert filling.source.reads == [(bad.offset, bad.length)]
        entry.verify()  # waits until it is written
        entry.close()
        assert _scan(filling) == []


def test_a_flipped_bit_of_the_table_is_found(filling: Filling, path: Path) -> None:
    for extent in range(presence.extent_count(len(CONTENT))):
        flip(filling.map(), presence.TABLE_OFFSET + 4 * extent + extent % 4)
        assert [bad.offset for bad in _scan(filling)] == [extent * EXTENT]
        flip(filling.map(), presence.TABLE_OFFSET + 4 * extent + extent % 4)


def test_a_file_that_ends_early_is_bad_from_there(filling: Filling, path: Path) -> None:
    found = entryfiles.look(filling.blobs, DIGEST)
    with open(path, "r+b") as file:
        file.truncate(3 * EXTENT + 5)
    bad = scan(filling.blobs, found, lambda count: None, hashed=False)
    assert [(one.offset, one.length) for one in bad] == [(3 * EXTENT, len(CONTENT) - 3 * EXTENT)]


def test_what_the_disk_does_not_give_is_bad(filling: Filling, path: Path) -> None:
    """Where a process has no memory, its mem says EIO, as a disk says of a bad sector."""
    found = entryfiles.look(filling.blobs, DIGEST)
    path.unlink()
    path.symlink_to("/proc/self/mem")
    bad = scan(filling.blobs, found, lambda count: None, hashed=True)
    assert bad == [Bad(DIGEST, 0, len(CONTENT), "it cannot be read")]


def test_neighbours_are_one_bad_part(filling: Filling, path: Path) -> None:
    for extent in (0, 1, 3, 5, 6):
        flip(path, extent * EXTENT)
    bad = _scan(filling)
    assert [(one.offset // EXTENT, -(-one.length // EXTENT)) for one in bad] == [(0, 2), (3, 1), (5, 2)]


def test_what_is_not_there_is_not_bad(filling: Filling) -> None:
    entry = filling.open()
    entry.blob.store(2 * EXTENT, CONTENT[2 * EXTENT : 4 * EXTENT])
    entry.close()
    assert entryfiles.look(filling.blobs, DIGEST).present == 2 * EXTENT
    assert _scan(filling) == []


def test_extents_that_come_and_go_are_not_bad(filling: Filling, path: Path) -> None:
    entry = filling.open()
    found = entryfiles.look(filling.blobs, DIGEST)
    done = threading.Event()

    def change() -> None:
        rng = random.Random(1)
        for _ in range(CHANGES):
            start = rng.randrange(6) * EXTENT
            entry.blob.drop(start, 2 * EXTENT if start < 5 * EXTENT else EXTENT)
            entry.blob.store(0, CONTENT)
        done.set()

    changing = threading.Thread(target=change)
    changing.start()
    rounds = 0
    while not done.is_set() or not rounds:
        assert scan(filling.blobs, found, lambda count: None, hashed=False) == []
        rounds += 1
    changing.join()
    entry.close()
