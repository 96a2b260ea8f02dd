# SPDX-License-Identifier: Apache-2.0
"""Blobs with a digest table, and a cache that was filled before, is filled at once, or repaired."""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from blockdev.caller import Caller
from blockdev.config import Policy
from blockdev.engine import EXTENT_SIZE, Blob, Priority
from blockdev.errors import CorruptImage, SourceError
from blockdev.fetch.pull import Pull
from blockdev.layer import CRC_ONLY, SHA256
from blockdev.source.blob import RegistryBlob
from formats.digests import UNIT, Place
from tests.checked import BLOB, DIGEST, END, PLACE, WAIT, Bench, Liar, await_written, same
from tests.filling import flip


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
    bench = Bench(tmp_path / "blobs", liar)
    undo.callback(bench.close)
    fill_unchecked(bench, (0, 3 * UNIT))
    liar.server.close()
    with ExitStack() as opening, pytest.raises(SourceError):
        bench.supply.open(
            DIGEST,
            len(BLOB),
            Policy("eio", 0.2),
            lambda offer, undo: RegistryBlob(bench.client, "app", DIGEST, len(BLOB), offer),
            opening,
            PLACE,
        )
    assert bench.head().table == ""


def test_an_opening_that_waits_for_its_table_ends_with_who_waits_for_it(bench: Bench) -> None:
    fill_unchecked(bench, (0, 3 * UNIT))
    bench.liar.server.close()
    with ExitStack() as opening, pytest.raises(ConnectionError):
        bench.supply.open(
            DIGEST,
            len(BLOB),
            Policy("hang"),
            lambda offer, undo: RegistryBlob(bench.client, "app", DIGEST, len(BLOB), offer),
            opening,
            PLACE,
            sleep=Caller(print, lambda: True).sleep,
        )
    assert not bench.cache.stat()[0].in_use


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
    bench.liar.place, bench.liar.lies = 9, 1
    unchecked = bench.open(undo, None)
    assert not same(unchecked.blob.read_at(0, 100), 0)
    checked = bench.open(undo)
    assert checked.checked == SHA256
    assert same(checked.blob.read_at(0, 100), 0)
    assert not same(unchecked.blob.read_at(0, 100), 0), "each has an entry of its own"


def test_two_tables_for_one_blob_are_held_apart(bench: Bench, undo: ExitStack) -> None:
    right = bench.open(undo)
    wrong = bench.open(undo, Place(PLACE.covered, f"sha256:{'0' * 64}"))
    with pytest.raises(SourceError):
        wrong.blob.read_at(0, 10)
    assert same(right.blob.read_at(0, 10), 0)


def test_a_blob_whose_whole_digest_was_right_needs_no_look(bench: Bench, undo: ExitStack, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(BLOB)
    with open(tmp_path / "file", "rb") as file:
        bench.cache.adopt(file.fileno(), DIGEST)
    bench.liar.server.close()
    named = bench.open(undo)
    assert bench.head().table == PLACE.digest
    assert bench.head().verified
    assert same(named.blob.read_at(0, len(BLOB)), 0)
    assert bench.cache.verified(named.blob)


def test_a_part_that_rots_is_fetched_with_its_unit_and_checked(bench: Bench, undo: ExitStack) -> None:
    blob = bench.open(undo).blob
    blob.read_at(0, len(BLOB))
    assert blob.drop(5 * EXTENT_SIZE, EXTENT_SIZE) == 1
    bench.liar.requests.clear()
    bench.liar.place, bench.liar.lies = 7 * EXTENT_SIZE, 1
    assert same(blob.read_at(5 * EXTENT_SIZE, 100), 5 * EXTENT_SIZE)
    assert bench.liar.requests == [(UNIT, 2 * UNIT - 1)] * 2


# ---- bulk -------------------------------------------------------------------------------------------


def pull(bench: Bench, blob: Blob) -> None:
    entry = bench.cache.in_use(blob)
    assert entry
    try:
        Pull("image", [entry], bench.supply, Policy("eio", WAIT)).complete(lambda *_: None, threading.Event())
        assert entry.verified
    finally:
        entry.close()


@pytest.mark.parametrize("lies", [0, 1])
def test_a_full_pull_is_checked_on_its_way(bench: Bench, undo: ExitStack, lies: int) -> None:
    bench.liar.place, bench.liar.lies = 4 * UNIT + 9, lies
    pull(bench, bench.open(undo).blob)
    assert len(bench.cached()) == -(-len(BLOB) // EXTENT_SIZE)
    assert bench.head().verified


def test_a_full_pull_of_what_stays_wrong_says_which_part(bench: Bench, undo: ExitStack) -> None:
    bench.liar.place, bench.liar.lies = 4 * UNIT + 9, 1 << 30
    blob = bench.open(undo).blob
    with pytest.raises(CorruptImage, match=f"{DIGEST}: offset {4 * UNIT}"):
        pull(bench, blob)
    blob.prefetch(0, UNIT, Priority.BULK)
    assert not bench.cached() & {16, 17, 18, 19}


# ---- repair -------------------------------------------------------------------------------------------


def test_a_repair_of_what_is_open_is_checked(bench: Bench, undo: ExitStack) -> None:
    blob = bench.open(undo).blob
    blob.read_at(0, 3 * UNIT)
    await_written(blob, 3 * UNIT + len(BLOB) - END)
    flip(bench.data, UNIT + 9)
    bench.liar.place, bench.liar.lies = UNIT + EXTENT_SIZE, 1
    (one,) = bench.repair()
    assert (one.state, one.offset) == ("repaired", UNIT)
    assert bench.liar.asked == 2 + 1
    await_written(blob, 3 * UNIT + len(BLOB) - END)
    assert bench.cached() >= set(range(12))
    assert bench.head().table == PLACE.digest


def test_a_repair_of_what_nobody_has_open_is_checked_when_somebody_has(bench: Bench, undo: ExitStack) -> None:
    with ExitStack() as first:
        blob = bench.open(first).blob
        blob.read_at(0, 3 * UNIT)
        await_written(blob, 3 * UNIT + len(BLOB) - END)
    flip(bench.data, UNIT + 9)
    bench.liar.place, bench.liar.lies = UNIT + 1, 1
    (one,) = bench.repair()
    assert one.state == "repaired"
    assert bench.head().table == ""
    blob = bench.open(undo).blob
    assert not bench.cached() & {4, 5, 6, 7}
    assert same(blob.read_at(0, 3 * UNIT), 0)
