# SPDX-License-Identifier: Apache-2.0
"""A cache on a disk that is full: blobs are read as ever, from memory."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blockdev.engine import EventKind
from blockdev.errors import SourceError
from formats.digests import UNIT, Place
from tests.checked import BLOB, PLACE, Bench, Liar, same
from tests.requires import requires_root


@pytest.fixture
def bench(tmp_path: Path, liar: Liar) -> Iterator[Bench]:
    """The shared one, with no room but for the files' heads."""
    requires_root()
    folder = tmp_path / "full"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True)
    try:
        made = Bench(folder / "blobs", liar)
        yield made
        made.close()
    finally:
        subprocess.run(["umount", folder], check=True)


def statuses(bench: Bench) -> set[int]:
    """Of the events that say that the cache is not written."""
    found = set()
    while event := bench.engine.next_event():
        if event.kind is EventKind.CACHE_WRITE:
            found.add(event.status)
    return found


def test_a_blob_with_a_table_is_read_from_memory(bench: Bench, undo: ExitStack) -> None:
    blob = bench.open(undo).blob
    for offset in (len(BLOB) - 10, 0, 3 * UNIT + 77, 5 * UNIT - 5):
        assert same(blob.read_at(offset, 10), offset)
    assert statuses(bench) == {-errno.ENOSPC}


def test_what_came_with_a_wrong_unit_is_asked_for_again(bench: Bench, undo: ExitStack) -> None:
    bench.liar.place, bench.liar.lies = 2 * UNIT + 5, 1 << 30
    blob = bench.open(undo).blob
    assert same(blob.read_at(len(BLOB) - 1, 1), len(BLOB) - 1)
    with pytest.raises(SourceError):
        blob.read_at(0, 8 * UNIT)
    assert same(blob.read_at(3 * UNIT, 5 * UNIT), 3 * UNIT)


@pytest.mark.parametrize("place", [None, PLACE])
def test_a_registry_that_ignores_ranges_is_read_with_pauses(bench: Bench, undo: ExitStack, place: Place | None) -> None:
    bench.liar.ranges = False
    blob = bench.open(undo, place).blob
    for offset in (0, 5 * UNIT - 5):
        assert same(blob.read_at(offset, 10), offset)
    assert statuses(bench) == {-errno.ENOSPC}
