# SPDX-License-Identifier: Apache-2.0
"""The verified flag: set when it is true, gone, durably, before it would not be; and the map's very bytes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import entryfiles
from blockdev.cache import Entry
from blockdev.config import Policy
from formats import presence
from tests import golden_map
from tests.commands import until
from tests.filling import CONTENT, DIGEST, EXTENT, Filling, flip


@pytest.fixture
def filling(tmp_path: Path) -> Iterator[Filling]:
    filling = Filling(tmp_path)
    yield filling
    filling.close()


@pytest.fixture
def verified(filling: Filling) -> Iterator[Entry]:
    entry = filling.open()
    entry.verify()
    assert entry.verified
    assert filling.sealed()
    yield entry
    entry.close()


def test_the_engine_makes_the_maps_that_are_kept(filling: Filling) -> None:
    entry = filling.open(golden_map.CONTENT)
    for number in golden_map.PARTIAL:
        entry.blob.store(number * EXTENT, golden_map.EXTENTS[number])
    assert filling.map(golden_map.CONTENT).read_bytes() == golden_map.kept("partial")
    entry.verify()
    assert filling.map(golden_map.CONTENT).read_bytes() == golden_map.kept("sealed")
    entry.close()


def test_the_engine_makes_the_map_of_a_repositorys_own(filling: Filling) -> None:
    size, repository = len(golden_map.CONTENT), golden_map.REPOSITORY
    entry = filling.cache.open(golden_map.DIGEST, size, Policy("hang"), repository=repository)
    for number in golden_map.PARTIAL:
        entry.blob.store(number * EXTENT, golden_map.EXTENTS[number])
    assert filling.map(golden_map.CONTENT).read_bytes() == golden_map.kept("owned")
    entry.close()


@pytest.mark.parametrize("name", ["partial", "sealed"])
def test_the_engine_reads_the_maps_that_are_kept(filling: Filling, name: str) -> None:
    path = entryfiles.path_of(filling.blobs, golden_map.DIGEST)
    path.parent.mkdir(parents=True)
    path.write_bytes(golden_map.CONTENT)
    entryfiles.map_of(path).write_bytes(golden_map.kept(name))
    entry = filling.open(golden_map.CONTENT)
    assert entry.verified == (name == "sealed")
    assert entry.blob.read_at(0, len(golden_map.CONTENT)) == golden_map.CONTENT
    asked = {at // EXTENT for offset, length in filling.source.reads for at in range(offset, offset + length, EXTENT)}
    assert asked == (set() if name == "sealed" else golden_map.WHOLE - golden_map.PARTIAL)
    entry.close()


def test_what_is_verified_is_not_hashed_or_fetched_again(filling: Filling, verified: Entry) -> None:
    verified.close()
    filling.source.reads.clear()
    again = filling.open()
    assert again.verified
    assert again.blob.read_at(0, len(CONTENT)) == CONTENT
    assert again.verified
    assert filling.source.reads == []
    again.close()


def test_dropping_an_extent_ends_it_on_disk_and_here(filling: Filling, verified: Entry) -> None:
    assert verified.blob.drop(EXTENT, EXTENT) == 1
    assert not verified.verified
    assert not filling.sealed()
    assert not filling.cache.stat()[0].verified
    assert not filling.cache.verified(verified.blob)
    assert verified.blob.read_at(0, len(CONTENT)) == CONTENT
    assert not verified.verified
    verified.verify()
    assert verified.verified
    assert filling.sealed()
    assert filling.cache.verified(verified.blob)


def test_a_rotten_extent_ends_it(filling: Filling, verified: Entry) -> None:
    verified.close()
    flip(entryfiles.path_of(filling.blobs, DIGEST), 3 * EXTENT + 5)
    again = filling.open()
    assert again.verified  # nobody has looked yet
    assert again.blob.read_at(0, EXTENT) == CONTENT[:EXTENT]
    assert again.verified
    assert again.blob.read_at(3 * EXTENT, 10) == CONTENT[3 * EXTENT :][:10]
    assert not again.verified
    assert not filling.sealed()
    again.close()
    assert not filling.cache.stat()[0].verified
    third = filling.open()
    assert not third.verified
    third.close()


def test_a_rotten_entry_of_the_table_ends_it_too(filling: Filling, verified: Entry) -> None:
    verified.close()
    flip(filling.map(), presence.TABLE_OFFSET + 4)
    again = filling.open()
    assert again.blob.read_at(0, len(CONTENT)) == CONTENT
    assert not again.verified
    assert not filling.sealed()
    again.close()


def test_a_map_that_has_lost_extents_is_not_verified(filling: Filling, verified: Entry) -> None:
    verified.close()
    os.truncate(filling.map(), presence.TABLE_OFFSET + 8)
    assert filling.sealed()
    assert not filling.cache.stat()[0].verified
    again = filling.open()
    assert not again.verified
    assert not filling.sealed()
    again.close()


def test_what_goes_while_the_blob_is_hashed_is_hashed_again(filling: Filling) -> None:
    entry = filling.open()
    entry.blob.store(0, CONTENT[: 4 * EXTENT])
    filling.source.gate.clear()
    hashing = threading.Thread(target=entry.verify)
    hashing.start()
    assert until(lambda: bool(filling.source.reads))
    assert entry.blob.drop(0, EXTENT) == 1
    filling.source.gate.set()
    hashing.join(20)
    assert entry.verified
    assert entry.complete
    assert (0, EXTENT) in filling.source.reads
    entry.close()


def test_a_map_of_the_first_version_starts_anew(filling: Filling, verified: Entry) -> None:
    verified.close()
    head = bytearray(filling.map().read_bytes()[: presence.HEAD_SIZE])
    head[8] = 1
    head[24:504] = (b"\1" + bytes(7) + DIGEST.encode()).ljust(480, b"\0")
    head[504:] = bytes(4) + presence.standard(bytes(head[:504] + bytes(4))).to_bytes(4, "little")
    with open(filling.map(), "r+b") as file:
        os.pwrite(file.fileno(), head, 0)
    again = filling.open()
    assert not again.verified
    assert again.blob.stat().present_bytes == 0
    assert again.blob.read_at(0, len(CONTENT)) == CONTENT
    again.verify()
    assert again.verified
    again.close()
