# SPDX-License-Identifier: Apache-2.0
"""A cache on a disk that is full: blobs are read as ever, from memory."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest

from blockdev.config import Policy
from blockdev.engine import Blob, EventKind
from blockdev.errors import EngineError, SourceError
from blockdev.fetch.pull import Pull
from formats.digests import UNIT, Place
from tests.checked import BLOB, DIGEST, END, PLACE, WAIT, Bench, Liar, await_written, same
from tests.commands import until
from tests.fakes.http_server import PIECE_WAIT, Answer, Seen
from tests.filling import flip
from tests.requires import requires_root


@pytest.fixture
def bench(request: pytest.FixtureRequest, tmp_path: Path, liar: Liar) -> Iterator[Bench]:
    """The shared one; unless it is said otherwise, with no room but for the files' heads."""
    requires_root()
    folder = tmp_path / "full"
    folder.mkdir()
    size = getattr(request, "param", "64k")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        made = Bench(folder / "blobs", liar)
        yield made
        made.close()
    finally:
        subprocess.run(["umount", folder], check=True)


def make_room(bench: Bench) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", bench.blobs.parent], check=True)


def pull(bench: Bench, blob: Blob) -> None:
    """All of it, onto the disk."""
    entry = bench.cache.in_use(blob)
    assert entry
    with closing(entry):
        Pull("app", [entry], bench.supply, Policy("eio", WAIT)).complete(lambda *_: None, threading.Event())
        assert entry.complete
        assert entry.verified


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


@pytest.mark.parametrize("bench", ["3m"], indirect=True)
def test_what_comes_before_a_table_needs_no_room_twice(bench: Bench, undo: ExitStack) -> None:
    bench.liar.ranges = False
    blob = bench.open(undo).blob
    assert blob.read_at(0, len(BLOB)) == BLOB
    await_written(blob, len(BLOB))
    assert len(bench.liar.requests) == 1


@pytest.mark.parametrize("bench", ["2m"], indirect=True)
def test_what_has_no_room_before_a_table_takes_none(
    bench: Bench, undo: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    answer, gate = bench.liar.server.answer, threading.Event()
    bench.liar.ranges = False
    bench.liar.server.answer = lambda seen: replace(answer(seen), gate=gate, hold_at=9 * UNIT)
    free = os.statvfs(bench.blobs.parent).f_bfree
    blob = bench.open(undo).blob
    with caplog.at_level(logging.INFO):
        reader = threading.Thread(target=blob.read_at, args=(0, 10))
        reader.start()
        assert until(lambda: "no room" in caplog.text)
        assert until(lambda: os.statvfs(bench.blobs).f_bfree > free // 2, PIECE_WAIT / 2)
    gate.set()
    reader.join(WAIT)
    assert not reader.is_alive()


@pytest.mark.parametrize("place", [None, PLACE])
def test_when_there_is_room_again_a_pull_has_it_all(bench: Bench, undo: ExitStack, place: Place | None) -> None:
    blob = bench.open(undo, place).blob
    assert same(blob.read_at(0, 5 * UNIT), 0)
    make_room(bench)
    pull(bench, blob)


def test_a_pull_asks_again_for_what_did_not_come_though_the_disk_was_full(bench: Bench, undo: ExitStack) -> None:
    blob = bench.open(undo, None).blob
    assert same(blob.read_at(0, UNIT), 0)
    make_room(bench)
    bench.liar.cut = 0
    pull(bench, blob)


def test_a_pull_ends_where_there_is_no_room(bench: Bench, undo: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockdev.fetch.pull.UNWRITTEN_LIMIT", 0.5)
    blob = bench.open(undo).blob
    with pytest.raises(EngineError, match=r"cannot be kept: No space left"):
        pull(bench, blob)
    assert same(blob.read_at(3 * UNIT, UNIT), 3 * UNIT)


def test_when_there_is_room_again_a_file_is_added_whole(bench: Bench, undo: ExitStack, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(BLOB)
    blob = bench.open(undo).blob
    assert same(blob.read_at(UNIT, 5 * UNIT), UNIT)
    with open(tmp_path / "file", "rb") as file:
        with pytest.raises(EngineError, match="errno 28"):
            bench.cache.adopt(file.fileno(), DIGEST)
        asked = len(bench.liar.requests)
        assert same(blob.read_at(UNIT, 5 * UNIT), UNIT)
        assert len(bench.liar.requests) == asked
        make_room(bench)
        assert bench.cache.adopt(file.fileno(), DIGEST) == DIGEST
    assert bench.head().verified


@pytest.mark.parametrize("bench", ["8m"], indirect=True)
@pytest.mark.parametrize("in_use", [True, False])
def test_what_a_repair_has_no_room_for_is_not_repaired(bench: Bench, undo: ExitStack, in_use: bool) -> None:
    with ExitStack() as first:
        blob = bench.open(undo if in_use else first).blob
        blob.read_at(0, 3 * UNIT)
        await_written(blob, 3 * UNIT + len(BLOB) - END)
    flip(bench.data, UNIT + 9)
    answer = bench.liar.server.answer

    def fill_and_answer(seen: Seen) -> Answer:
        with contextlib.suppress(OSError), open(bench.blobs.parent / "filler", "wb") as filler:
            filler.write(bytes(8 << 20))
        return answer(seen)

    bench.liar.server.answer = fill_and_answer
    (one,) = bench.repair()
    assert (one.state, one.kind) == ("dropped", "EngineError")
    if in_use:
        assert same(blob.read_at(0, 3 * UNIT), 0)
